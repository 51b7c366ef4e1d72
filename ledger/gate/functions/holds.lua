-- The steps of a call: reserve, record, note, settle.

-- The newest event on the stream ('': none). Who finds that something was done before is told it, and so of the event
-- that did it: from then on it is missed where the ledger goes back in time.
local function newest(ledger)
  local entries = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', 1)
  return entries[1] and entries[1][1] or ''
end

local function exists(call, result_key, ledger)
  if call.state == 'open' then
    return { 'EXISTS', 'open', call.hold, call.amount, call.worker, call.deadline, call.recorded, call.begun,
      call.spent, call.assumed, call.budgets, call.period,
      string.match(call.marks, ' g' .. call.begun .. '=(%S+)') or '', newest(ledger) }
  end
  return { 'EXISTS', call.state, redis.call('GET', result_key) or '', call.denial, newest(ledger) }
end

--[[ reserve: hold money for a call, against one or more budgets, all or nothing.
KEYS meta ledger holds waiters account call result tail...
ARGS 1 ledger_id 2 call_id
     3 "user_id, period, content hash, worker, amount, lease ms, valid from ms, valid until ms,
        final (1: the wait is over, deny instead of WAIT; 2: a trial, WAIT also instead of DENIED, and nothing is
        written unless money is held), call ttl s"
     4 payload 5.. budgets with baselines, the user's period first
OK id hold attempt committed cap deadline-ms plan ('': none assigned)
| DENIED budget settled held cap reason (cap | wait_timeout) | WAIT budget settled held cap
| EXISTS open hold amount worker deadline-ms recorded begun spent assumed budgets period provider=id|'' newest
| EXISTS settled|denied result denial newest | CONFLICT | STOPPED reason | POLICY version | WINDOW now-ms ]]
local function reserve(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local call_key, call_id = keys[6], args[2]
  -- As in a call's record, the user's id is matched shortest first.
  local user, period, hash, worker, amount, lease, from, til, final, ttl =
    string.match(args[3], '^(..-) (%S+) (%S+) (%S+) (%d+) (%d+) (%d+) (%d+) ([012]) ([1-9]%d*)$')
  if not user then
    bug('malformed reservation: ' .. args[3])
  end
  amount, lease, from, til, ttl = exact(amount, MAX_AMOUNT), exact(lease), exact(from), exact(til), exact(ttl)
  local now = now_ms()
  local call = read_call(call_key)
  if call then
    if call.hash ~= hash then -- G4
      return { 'CONFLICT' }
    elseif call.state ~= 'closed' then -- G2 G4
      return exists(call, keys[7], keys[2])
    end
  end
  if meta.stopped then -- G8
    return { 'STOPPED', meta.stopped }
  end
  refusal = other_policy(meta)
  if refusal then
    return refusal
  end
  if now < from or now >= til then
    return { 'WINDOW', text(now) }
  end
  local names, baselines = read_budgets(args, 5)
  local tails = tails_of(keys, 8)
  local w
  w, refusal = weigh(meta, tails, names, baselines, keys[5], period, amount)
  if not w then
    return refusal
  end
  if final == '2' and (w.denied or w.waiting) then
    return verdict('WAIT', names, w, w.denied or w.waiting)
  end
  local refused = w.denied or (final == '1' and w.waiting)
  if w.waiting and not refused then
    redis.call('HSET', keys[4], names[w.waiting], '1')
    return verdict('WAIT', names, w, w.waiting)
  end
  call = call or new_call(hash, worker, user, period)
  -- After those that were begun and not recorded: a late report of an earlier hold's worker must not count as ours.
  local attempt = text(math.max(exact(call.recorded), exact(call.begun)) + 1)
  if refused then
    local reply = verdict('DENIED', names, w, refused)
    reply[6] = w.denied and 'cap' or 'wait_timeout'
    local b = w.balances[refused]
    local stamps = { '"budget":' .. cjson.encode(names[refused]), '"cap_nanousd":' .. text(w.caps[refused]),
      '"settled_nanousd":' .. text(b.s), '"held_nanousd":' .. text(b.h), '"reason":"' .. reply[6] .. '"' }
    stamp_plan(stamps, w.plan)
    stamp_hash(stamps, hash)
    local plan = plan_for_alerts(meta, w.plan, args[4])
    local due = w.denied and due_refusal_alerts(meta, names, w, refused, plan) or NONE
    append(meta, keys[2], 'budget-denied', user, period, call_id, attempt, amount,
      text(w.balances[1].s + w.balances[1].h), splice(stamps, args[4]))
    call.state = 'denied'
    call.denial = table.concat({ names[refused], text(b.s), text(b.h), text(w.caps[refused]), text(amount), reply[6] }, ' ')
    write_call(call_key, call, ttl)
    append_alerts(meta, keys[2], due, call_id)
    return reply
  end
  local hold, deadline, cap = text(exact(call.hold) + 1), text(now + lease), text(w.caps[1])
  local committed = text(w.balances[1].s + w.balances[1].h + amount)
  local stamps = { '"hold":' .. hold, '"cap_nanousd":' .. cap, '"deadline_ms":' .. deadline }
  stamp_plan(stamps, w.plan)
  stamp_hash(stamps, hash)
  stamp_budgets(stamps, names, w.balances, w.caps, amount)
  redis.call('ZADD', keys[3], deadline, call_id) -- G3
  local id = append(meta, keys[2], 'budget-reserved', user, period, call_id, attempt, amount, committed,
    splice(stamps, args[4]))
  for i, tail in ipairs(tails) do
    push(tail, id, 0, amount, w.balances[i])
  end
  call.state, call.hold, call.amount, call.worker, call.deadline = 'open', hold, text(amount), worker, deadline
  call.begun, call.spent, call.assumed = attempt, '0', '0'
  call.cap, call.plan = cap, plan_for_alerts(meta, w.plan, args[4])
  move_call(call, period, table.concat(names, '\n'))
  write_call(call_key, call)
  return { 'OK', id, hold, attempt, committed, cap, deadline, w.plan }
end

-- The call of an open hold, or a refusal.
local function open_hold(call_key, hold, names)
  local call = read_call(call_key)
  if not call then
    return nil, { 'UNKNOWN' }
  end
  local cost, assumed = settled_hold(call, hold)
  if cost then
    return nil, { 'SETTLED', cost .. ' ' .. assumed, call.state } -- G2
  end
  if call.state ~= 'open' or call.hold ~= hold then -- G2
    return nil, { 'UNKNOWN' }
  end
  if names and table.concat(names, '\n') ~= call.budgets then
    return nil, { 'MISMATCH', call.budgets }
  end
  return call
end

--[[ record: record attempts while the hold stays open, and extend the hold for the next one.
KEYS meta ledger account call tail...
ARGS 1 ledger_id 2 call_id 3 hold 4 attempts begun 5 spent by recorded attempts 6 assumed part of it
     7 extension (0: none) 8 number of events 9.. events, then payload of the extension, then budgets with baselines
OK id|'' hold-amount | DENIED/WAIT budget settled held cap (events are appended, the hold is not extended)
A repeat of an earlier record that is executed late, after the next one, changes nothing.
| SETTLED cost-assumed state | STOPPED reason, POLICY version (with an extension) | UNKNOWN | MISMATCH budgets ]]
local function record(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local count, extension = int(args[8]), amount_of(args[7])
  local begun, spent, assumed = int(args[4]), amount_of(args[5]), amount_of(args[6])
  local events, payload_at = read_attempts(args, 9, count), 9 + 3 * count
  local names, baselines = read_budgets(args, payload_at + 1)
  local call
  call, refusal = open_hold(keys[4], args[3], names)
  if not call then
    return refusal
  end
  -- Else who takes the hold over would charge less than was begun.
  if begun < exact(call.begun) or spent < exact(call.spent) then -- G3
    return { 'OK', '', call.amount }
  end
  if meta.stopped and extension > 0 then -- G8
    return { 'STOPPED', meta.stopped }
  end
  refusal = extension > 0 and other_policy(meta)
  if refusal then
    return refusal
  end
  local tails, attempt = tails_of(keys, 5), args[4]
  local extends = extension > 0 and mark(call, 'x' .. attempt)
  local w
  if extends then
    w, refusal = weigh(meta, tails, names, baselines, keys[3], call.period, extension)
    if not w then
      return refusal
    end
  end
  append_attempts(meta, keys[2], call, args[2], call.period, events, known_committed(tails[1]))
  call.spent, call.assumed = text(spent), text(assumed)
  local refused = extends and (w.denied or w.waiting) -- G1
  if refused then
    call.marks = (string.gsub(call.marks, ' x' .. attempt .. ' ', ' '))
    write_call(keys[4], call)
    return verdict(w.denied and 'DENIED' or 'WAIT', names, w, refused)
  end
  local id = ''
  if extends then
    local stamps = { '"hold":' .. args[3], '"cap_nanousd":' .. text(w.caps[1]), '"deadline_ms":' .. call.deadline }
    stamp_plan(stamps, w.plan)
    stamp_budgets(stamps, names, w.balances, w.caps, extension)
    id = append(meta, keys[2], 'budget-reserved', call.user, call.period, args[2], attempt, extension,
      text(w.balances[1].s + w.balances[1].h + extension), splice(stamps, args[payload_at]))
    for i, tail in ipairs(tails) do
      push(tail, id, 0, extension, w.balances[i])
    end
    call.amount = text(exact(call.amount) + extension)
  end
  call.begun = text(begun) -- G3
  write_call(keys[4], call)
  return { 'OK', id, call.amount }
end

--[[ note: keep the provider's id of the request in flight with the open hold, so that whoever settles it instead of its
worker can ask what it cost. Appends no event.
KEYS meta ledger call
ARGS 1 ledger_id 2 hold 3 attempt 4 provider 5 id
OK (also where another attempt has begun, and nothing is noted) | UNKNOWN ]]
local function note(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local attempt = int(args[3])
  if not string.find(args[4], '^[%w_.-]+$') or not string.find(args[5], '^[!-~]+$') or #args[5] > 200 then
    bug('not the id of a request: ' .. args[4] .. ' ' .. args[5])
  end
  local call = read_call(keys[3])
  if not call or call.state ~= 'open' or call.hold ~= args[2] then
    return { 'UNKNOWN' }
  end
  if attempt == exact(call.begun) then -- G3
    forget_id(call)
    mark(call, 'g' .. text(attempt) .. '=' .. args[4] .. '=' .. args[5])
    write_call(keys[3], call)
  end
  return { 'OK' }
end

--[[ settle: replace a hold by its cost, store the result, and free the rest of the hold.
KEYS meta ledger holds waiters call result tail...
ARGS 1 ledger_id 2 call_id
     3 "hold, cost, assumed part of it, attempt, final (1: the call is over), result ttl s, call ttl s, number of events"
     4 result ('': none) 5 payload 6.. events, then budgets (names, or with baselines after STALE)
OK id committed | SETTLED cost-assumed state (nothing is changed) | UNKNOWN | MISMATCH budgets ]]
local function settle(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local hold, cost, assumed, attempt, final, result_ttl, call_ttl, count =
    string.match(args[3], '^(%d+) (%d+) (%d+) (%d+) ([01]) ([1-9]%d*) ([1-9]%d*) (%d+)$')
  if not hold then
    bug('malformed settlement: ' .. args[3])
  end
  cost, assumed, attempt = exact(cost, MAX_AMOUNT), exact(assumed, MAX_AMOUNT), text(exact(attempt))
  result_ttl, call_ttl, count = exact(result_ttl), exact(call_ttl), exact(count)
  local call_key, events = keys[5], read_attempts(args, 6, count)
  local names, baselines = read_budgets(args, 6 + 3 * count)
  local call
  call, refusal = open_hold(call_key, hold, names)
  if not call then
    if refusal[1] == 'SETTLED' then
      refusal[4] = newest(keys[2])
    end
    return refusal
  end
  local tails, balances = tails_of(keys, 7), {}
  for i, name in ipairs(names) do
    balances[i], refusal = known_balance(meta, tails[i], name, baselines[i])
    if not balances[i] then
      return refusal
    end
  end
  local due = due_alerts(meta, names, balances, cost, exact(call.cap), call.plan)
  wake(keys[4], names)
  redis.call('ZREM', keys[3], args[2])
  append_attempts(meta, keys[2], call, args[2], call.period, events, text(balances[1].s + balances[1].h))
  local amount = exact(call.amount)
  local freed = cost - amount
  local stamps = { '"hold":' .. hold, '"hold_nanousd":' .. call.amount }
  if freed > 0 then
    stamps[#stamps + 1] = '"overage_nanousd":' .. text(freed)
  end
  if final == '0' then
    stamps[#stamps + 1] = '"is_final":false'
  end
  stamp_budgets(stamps, names, balances, nil, freed)
  local committed = text(balances[1].s + balances[1].h + freed)
  local id = append(meta, keys[2], 'cost-recorded', call.user, call.period, args[2], attempt, cost, committed,
    splice(stamps, args[5]))
  for i, tail in ipairs(tails) do
    push(tail, id, cost, -amount, balances[i])
  end
  append_alerts(meta, keys[2], due, args[2])
  call.state = final == '1' and 'settled' or 'closed'
  forget_id(call)
  set_settled(call, hold, cost, assumed) -- G2
  write_call(call_key, call, call_ttl)
  if args[4] ~= '' then
    redis.call('SET', keys[6], args[4], 'EX', result_ttl)
    announce(keys[6], args[2])
  end
  return { 'OK', id, committed }
end
