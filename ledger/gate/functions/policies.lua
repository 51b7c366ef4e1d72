-- The policy in force.

-- The calls whose holds are open while budgets are opened, by key: from then on, these stand against the budgets too.
-- Each argument from `at` on is "place hold amount call", place that of the budget; return also each budget's holds as JSON.
local function read_opened_holds(keys, args, at, opened)
  local calls, tails = {}, #opened
  for i = at, #args do
    local key = keys[i - at + 3 + tails]
    local place, hold, amount, call_id = string.match(args[i], '^(%d+) (%d+) (%d+) (.+)$')
    local budget = opened[tonumber(place)]
    calls[key] = calls[key] or read_call(key)
    local call = calls[key]
    if not budget or not call or call.state ~= 'open' or call.hold ~= hold or call.amount ~= amount then -- G1
      bug('not an open hold: ' .. args[i])
    end
    call.opened = call.opened or call.budgets
    call.opened = call.opened .. '\n' .. budget.name
    budget.held = budget.held + int(amount)
    budget.holds[#budget.holds + 1] = '{"call_id":' .. cjson.encode(call_id) .. ',"hold":' .. hold ..
      ',"amount_nanousd":' .. amount .. '}'
  end
  return calls
end

--[[ apply_policy: put a policy in force, from this step on. Versions only grow; a caller that has read another version
than the one in force changes nothing. Budgets that the policy defines may begin with what was spent before, and with the
holds that are open: the caller has counted both up to the newest event.
KEYS meta ledger, then the tail of each budget that is opened, then the call of each hold
ARGS 1 ledger_id 2 version in force, as the caller has read it 3 version 4 digest 5 payload
     6 "seq until": number of the newest event that the caller has counted, and when the first of the windows that it
       counted in ends, in ms ('': neither matters; `recovered`: nor does it that calls are stopped)
     7.. "spent cap name" of each budget that is opened, then of each hold that is open and counts in one
       "place hold amount call", place that of the budget, from 1
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
  local opened, at = {}, 7
  while at <= #args do
    local spent, cap, name = string.match(args[at], '^(%d+) (%d+) (%l[%w_~-]*:.*)$')
    if not spent then
      break
    elseif redis.call('EXISTS', keys[at - 4]) == 1 then
      bug('not a budget to open: ' .. args[at])
    end
    opened[at - 6] = { tail = keys[at - 4], spent = amount_of(spent), cap = amount_of(cap), name = name, held = 0, holds = {} }
    at = at + 1
  end
  local calls = read_opened_holds(keys, args, at, opened)
  local id = append(meta, keys[2], 'policy-applied', '', '', '', '0', 0, '', args[5])
  redis.call('HSET', keys[1], 'policy_version', version, 'policy_digest', args[4], 'policy', args[5]) -- G11
  alert_rules[keys[1]] = nil
  for _, budget in ipairs(opened) do
    local held = ''
    if #budget.holds > 0 then
      held = '"hold_nanousd":' .. text(budget.held) .. ',"holds":[' .. table.concat(budget.holds, ',') .. '],'
    end
    local event = append(meta, keys[2], 'budget-opened', '', '', '', '0', budget.spent, '', '{"policy_version":' ..
      version .. ',' .. held .. '"budgets":[{"budget":' .. cjson.encode(budget.name) .. ',"cap_nanousd":' ..
      text(budget.cap) .. ',"committed_nanousd":' .. text(budget.spent + budget.held) .. '}]}')
    push(budget.tail, event, budget.spent, budget.held, { s = 0, h = 0 })
  end
  for key, call in pairs(calls) do -- G1
    move_call(call, call.period, call.opened)
    write_call(key, call)
  end
  return { 'OK', id }
end
