-- The policy in force.

--[[ apply_policy: put a policy in force, from this step on. Versions only grow; a caller that has read another version
than the one in force changes nothing. Budgets that the policy defines may begin with what was spent before: the caller
has counted it up to the newest event.
KEYS meta ledger, then the tail of each budget that is opened
ARGS 1 ledger_id 2 version in force, as the caller has read it 3 version 4 digest 5 payload
     6 "seq until": number of the newest event that the caller has counted, and when the first of the windows that it
       counted in ends, in ms ('': neither matters; `recovered`: nor does it that calls are stopped)
     7.. "spent cap name" of each budget that is opened
OK id | EXISTS newest (this version is in force) | MOVED version | BEHIND seq | STOPPED reason ]]
local function apply_policy(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local version = text(int(args[3]))
  if version == meta.policy and redis.call('HGET', keys[1], 'policy_digest') == args[4] then
    return { 'EXISTS', newest(keys[2]) }
  elseif meta.policy ~= args[2] or int(version) <= int(meta.policy) then
    return { 'MOVED', meta.policy }
  elseif meta.stopped and args[6] ~= 'recovered' then -- G8
    return { 'STOPPED', meta.stopped }
  end
  local counted, til = string.match(args[6], '^(%d+) (%d+)$')
  if counted and (int(counted) ~= meta.seq or now_ms() >= int(til)) then -- G1
    return { 'BEHIND', text(meta.seq) }
  end
  local opened = {}
  for i = 7, #args do
    local spent, cap, name = string.match(args[i], '^(%d+) (%d+) (%l[%w_~-]*:.*)$')
    if not spent or redis.call('EXISTS', keys[i - 4]) == 1 then
      bug('not a budget to open: ' .. args[i])
    end
    opened[i - 6] = { tail = keys[i - 4], spent = amount_of(spent), cap = amount_of(cap), name = name }
  end
  local id = append(meta, keys[2], 'policy-applied', '', '', '', '0', 0, '', args[5])
  redis.call('HSET', keys[1], 'policy_version', version, 'policy_digest', args[4], 'policy', args[5]) -- G11
  alert_rules[keys[1]] = nil
  for _, budget in ipairs(opened) do
    local spent = text(budget.spent)
    local event = append(meta, keys[2], 'budget-opened', '', '', '', '0', budget.spent, '', '{"policy_version":' ..
      version .. ',"budgets":[{"budget":' .. cjson.encode(budget.name) .. ',"cap_nanousd":' .. text(budget.cap) ..
      ',"committed_nanousd":' .. spent .. '}]}')
    push(budget.tail, event, budget.spent, 0, { s = 0, h = 0 })
  end
  return { 'OK', id }
end
