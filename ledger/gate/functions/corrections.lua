-- What is booked beside a hold or after it: adjust, release, charge.

--[[ adjust: correct a settled hold to its true cost. A repeat with the same cost changes nothing.
A late answer may bring the task's result; it is stored if the call was closed without one. A call that is known to be
over ends without one. Where the caller says what it has seen, a correction that is repeated late does not undo a newer
one.
KEYS meta ledger waiters call result tail...
ARGS 1 ledger_id 2 call_id 3 hold 4 true cost 5 assumed part of it 6 attempt 7 result ('': none) 8 result ttl s
     9 payload 10 number of events 11 call ttl s 12 1: the call is over, or 0; then " cost assumed" as the caller has
     read them, if it has 13.. events, then budgets (names, or with baselines after STALE)
OK id|'' difference state | UNKNOWN | MISMATCH budgets | CHANGED "cost assumed" ]]
local function adjust(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local call_key, count = keys[4], int(args[10])
  local cost, assumed, attempt = amount_of(args[4]), amount_of(args[5]), text(int(args[6]))
  local events, result_ttl, call_ttl = read_attempts(args, 13, count), seconds_of(args[8]), seconds_of(args[11])
  local call = read_call(call_key)
  if not call or not settled_hold(call, args[3]) then
    return { 'UNKNOWN' }
  end
  local was_cost, was_assumed, period, budgets = settled_hold(call, args[3])
  local names, baselines = read_budgets(args, 13 + 3 * count)
  if table.concat(names, '\n') ~= budgets then
    return { 'MISMATCH', budgets }
  end
  local is_over, was_seen = string.match(args[12], '^([01]) ?(.*)$')
  local stands = was_cost .. ' ' .. was_assumed
  if was_seen ~= '' and was_seen ~= stands and stands ~= text(cost) .. ' ' .. text(assumed) then -- G3
    return { 'CHANGED', stands }
  end
  local tails, balances = tails_of(keys, 6), {}
  for i, name in ipairs(names) do
    balances[i], refusal = known_balance(meta, tails[i], name, baselines[i])
    if not balances[i] then
      return refusal
    end
  end
  local difference, less_assumed, id = cost - int(was_cost), assumed - int(was_assumed), ''
  local due = difference > 0 and due_alerts(meta, names, balances, difference, exact(call.cap),
    period == call.period and call.plan)
  if difference < 0 then
    wake(keys[3], names)
  end
  append_attempts(meta, keys[2], call, args[2], period, events, text(balances[1].s + balances[1].h))
  is_over = is_over == '1'
  local ends = (is_over or args[7] ~= '') and call.state == 'closed' and call.hold == args[3]
  if ends then -- G4
    call.state = 'settled'
  end
  if ends and args[7] ~= '' then
    redis.call('SET', keys[5], args[7], 'EX', result_ttl)
    announce(keys[5], args[2])
  end
  if difference ~= 0 or less_assumed ~= 0 or (ends and is_over) then -- G3
    local stamps = { '"hold":' .. args[3], '"assumed_nanousd":' .. text(less_assumed) }
    if ends then
      stamps[#stamps + 1] = '"is_final":true'
    end
    stamp_budgets(stamps, names, balances, nil, difference)
    id = append(meta, keys[2], 'cost-adjusted', call.user, period, args[2], attempt, difference,
      text(balances[1].s + balances[1].h + difference), splice(stamps, args[9]))
    for i, tail in ipairs(tails) do
      push(tail, id, difference, 0, balances[i])
    end
    append_alerts(meta, keys[2], due or NONE, args[2])
    set_settled(call, args[3], cost, assumed)
  end
  -- The record of a call whose next hold is open must not expire.
  write_call(call_key, call, call.state ~= 'open' and call_ttl or nil)
  return { 'OK', id, text(difference), call.state }
end

--[[ release: give back what an attempt of a settled hold was assumed to cost. Each attempt is given back once, and only
while the hold stands as the caller has read it, so that a correction made since is never undone.
KEYS meta ledger waiters call tail...
ARGS 1 ledger_id 2 call_id 3 hold 4 "cost assumed" that the caller has read 5 attempt 6 amount 7 call ttl s
     8 payload 9.. budgets (names, or with baselines after STALE)
OK id | EXISTS newest | CHANGED "cost assumed" | UNKNOWN | MISMATCH budgets ]]
local function release(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local amount, attempt, ttl = amount_of(args[6]), text(int(args[5])), seconds_of(args[7])
  local call = read_call(keys[4])
  local cost, assumed, period, budgets
  if call then
    cost, assumed, period, budgets = settled_hold(call, args[3])
  end
  if not cost then
    return { 'UNKNOWN' }
  end
  local names, baselines = read_budgets(args, 9)
  if table.concat(names, '\n') ~= budgets then
    return { 'MISMATCH', budgets }
  end
  if not mark(call, 'r' .. attempt) then -- G4
    return { 'EXISTS', newest(keys[2]) }
  end
  if cost .. ' ' .. assumed ~= args[4] or amount > int(assumed) then -- G3
    return { 'CHANGED', cost .. ' ' .. assumed }
  end
  local tails, balances = tails_of(keys, 5), {}
  for i, name in ipairs(names) do
    balances[i], refusal = known_balance(meta, tails[i], name, baselines[i])
    if not balances[i] then
      return refusal
    end
  end
  wake(keys[3], names)
  local stamps = { '"hold":' .. args[3], '"assumed_nanousd":' .. text(-amount) }
  stamp_budgets(stamps, names, balances, nil, -amount)
  local id = append(meta, keys[2], 'cost-adjusted', call.user, period, args[2], attempt, -amount,
    text(balances[1].s + balances[1].h - amount), splice(stamps, args[8]))
  for i, tail in ipairs(tails) do
    push(tail, id, -amount, 0, balances[i])
  end
  set_settled(call, args[3], int(cost) - amount, int(assumed) - amount)
  -- The record of a call whose next hold is open must not expire.
  write_call(keys[4], call, call.state ~= 'open' and ttl or nil)
  return { 'OK', id }
end

--[[ charge: book spend that happened outside a hold; it is recorded even if it passes the cap.
KEYS meta ledger call account tail...
ARGS 1 ledger_id 2 call_id 3 user_id 4 period 5 content hash 6 cost 7 assumed part 8 call ttl s
     9 payload 10.. budgets with baselines; only the first has its cap (0: the caller does not know it)
OK id committed | EXISTS state | CONFLICT | POLICY version (if the caller names one: by it, the budgets were chosen) ]]
local function charge(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local call = read_call(keys[3])
  if call then
    return call.hash == args[5] and { 'EXISTS', call.state, newest(keys[2]) } or { 'CONFLICT' } -- G4
  end
  refusal = meta.version ~= '' and other_policy(meta)
  if refusal then
    return refusal
  end
  local names, baselines = read_budgets(args, 10)
  local cost, assumed, ttl = amount_of(args[6]), amount_of(args[7]), seconds_of(args[8])
  local tails, balances = tails_of(keys, 5), {}
  for i, name in ipairs(names) do
    balances[i], refusal = balance(meta, tails[i], name, baselines[i])
    if not balances[i] then
      return refusal
    end
  end
  local cap, assigned = cap_in_force(keys[4], args[4], baselines[1].cap)
  local plan = plan_for_alerts(meta, assigned, args[9])
  if baselines[1].cap == 0 and assigned == '' then -- What the cap is, nobody says.
    plan = '-'
  end
  local due = due_alerts(meta, names, balances, cost, cap, plan)
  local stamps, committed = {}, text(balances[1].s + balances[1].h + cost)
  if string.find(args[9], '"plan":', 1, true) then
    stamp_plan(stamps, assigned)
  end
  stamp_hash(stamps, args[5])
  stamp_budgets(stamps, names, balances, nil, cost)
  local id = append(meta, keys[2], 'cost-recorded', args[3], args[4], args[2], '0', cost, committed,
    splice(stamps, args[9]))
  for i, tail in ipairs(tails) do
    push(tail, id, cost, 0, balances[i])
  end
  append_alerts(meta, keys[2], due, args[2])
  call = new_call(args[5], '-', args[3], args[4])
  call.state, call.budgets, call.cap, call.plan = 'settled', table.concat(names, '\n'), text(cap), plan
  set_settled(call, '0', cost, assumed)
  write_call(keys[3], call, ttl)
  return { 'OK', id, committed }
end
