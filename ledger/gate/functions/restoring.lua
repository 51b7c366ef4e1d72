-- Lost events, put back as `tollbook recover` does.

-- The budgets of an event's call: the user's period, and the further ones that the gate has stamped.
local function budgets_of(event, payload)
  local names = { 'user:' .. event.user .. ':' .. event.period }
  for _, stamp in ipairs(payload.budgets or {}) do
    names[#names + 1] = stamp.budget
  end
  return names
end

local function settled_amounts(call, hold)
  local cost, assumed = settled_hold(call, hold)
  return cost and int(cost), assumed and int(assumed)
end

-- What an event says of its call: the call's record as the step that appended the event left it. An attempt tells by
-- itself only that a further one may have begun; the sweeper then charges an abandoned hold in full (G3).
local APPLY = {}

APPLY['budget-reserved'] = function(call, event, p)
  if p.kind == 'extension' then
    mark(call, 'x' .. event.attempt)
    call.amount, call.begun = text(exact(call.amount) + event.amount), text(int(event.attempt))
    return call
  end
  call = call or new_call(p.content_hash or '-', p.worker, event.user, event.period)
  call.state, call.hold, call.amount, call.worker = 'open', text(p.hold), text(event.amount), p.worker
  call.deadline, call.begun, call.spent, call.assumed = text(p.deadline_ms), text(int(event.attempt)), '0', '0'
  call.cap, call.plan = text(p.cap_nanousd or 0), p.assigned_plan or p.plan or '-'
  move_call(call, event.period, table.concat(budgets_of(event, p), '\n'))
  return call
end

APPLY['model-called'] = function(call, event, p)
  if not call or not mark(call, 'm' .. event.attempt) then
    return call
  end
  local attempt, is_of_hold = int(event.attempt), text(p.hold or 0) == call.hold
  call.recorded = text(math.max(exact(call.recorded), attempt))
  if event.step == 'record' and call.state == 'open' and is_of_hold then
    call.spent = text(exact(call.spent) + p.charge_nanousd)
    call.assumed = text(exact(call.assumed) + (p.charge_basis == 'assumed' and p.charge_nanousd or 0))
    call.begun = text(math.max(exact(call.begun), attempt + 1)) -- G3
  elseif event.step == 'record' and call.state == 'closed' and is_of_hold and p.outcome == 'ok' then
    call.state = 'settled' -- G4
  end
  return call
end

APPLY['fallback-used'] = function(call, event)
  if call then
    mark(call, 'f' .. event.attempt)
  end
  return call
end

APPLY['cost-recorded'] = function(call, event, p)
  local hold = text(p.hold or 0)
  if hold == '0' then
    call = new_call(p.content_hash or '-', '-', event.user, event.period)
    call.budgets = table.concat(budgets_of(event, p), '\n')
  end
  if call then
    call.state = p.is_final == false and 'closed' or 'settled'
    call.begun = hold == '0' and '0' or text(math.max(exact(call.begun), int(event.attempt)))
    set_settled(call, hold, event.amount, p.assumed_nanousd or 0)
  end
  return call
end

APPLY['cost-adjusted'] = function(call, event, p)
  local hold = text(p.hold or 0)
  local cost, assumed = 0, 0
  if call then
    cost, assumed = settled_amounts(call, hold)
  end
  if not call or not cost then
    return nil
  end
  set_settled(call, hold, cost + event.amount, assumed + (p.assumed_nanousd or 0))
  if p.is_final and call.state == 'closed' then
    call.state = 'settled'
  end
  if p.basis == 'released' then
    mark(call, 'r' .. event.attempt) -- G4
  end
  return call
end

APPLY['budget-denied'] = function(call, event, p)
  call = call or new_call(p.content_hash or '-', p.worker, event.user, event.period)
  call.state = 'denied'
  call.denial = table.concat({ p.budget, text(p.settled_nanousd), text(p.held_nanousd), text(p.cap_nanousd),
    text(event.amount), p.reason }, ' ')
  return call
end

APPLY['plan-assigned'] = function(_, event, p)
  local call = new_call(p.content_hash or '-', '-', event.user ~= '' and event.user or '-',
    event.period ~= '' and event.period or '-')
  call.state = 'settled'
  return call
end

APPLY['plan-cleared'] = APPLY['plan-assigned']
APPLY['credit-granted'] = APPLY['plan-assigned']
APPLY['credit-revoked'] = APPLY['plan-assigned']
APPLY['credit-expired'] = APPLY['plan-assigned']
APPLY['key-created'] = APPLY['plan-assigned']
APPLY['key-revoked'] = APPLY['plan-assigned']

-- Open holds stand against a budget that is opened, from then on.
local function open_budget(meta, p)
  for _, held in ipairs(p.holds or {}) do
    local key = beside(meta, 'call:' .. held.call_id)
    local call = read_call(key)
    if call and call.state == 'open' and call.hold == text(held.hold) then -- G1
      move_call(call, call.period, call.budgets .. '\n' .. p.budgets[1].budget)
      write_call(key, call)
    end
  end
end

-- Put back what one event moved: money in the tails, the hold, the account, the record of the call.
local function apply(meta, keys, event, ttl)
  local p, kind = event.p, event.type
  local ds = (kind == 'cost-recorded' or kind == 'cost-adjusted' or kind == 'budget-opened') and event.amount or 0
  local dh = kind == 'budget-reserved' and event.amount or kind == 'cost-recorded' and -(p.hold_nanousd or 0) or
    kind == 'budget-opened' and p.hold_nanousd or 0
  for i, tail in ipairs(event.tails) do
    local newest = redis.call('LINDEX', tail, -1)
    push(tail, event.id, ds, dh, newest and balance_after(newest) or event.baselines[i])
  end
  if kind == 'budget-reserved' and p.kind ~= 'extension' then
    redis.call('ZADD', keys[3], text(p.deadline_ms), event.call_id) -- G3
  elseif kind == 'cost-recorded' and (p.hold or 0) > 0 then
    redis.call('ZREM', keys[3], event.call_id)
  elseif kind == 'plan-assigned' then
    redis.call('HSET', event.account, 'plan', p.plan, 'cap_nanousd', text(p.cap_nanousd))
  elseif kind == 'plan-cleared' then
    redis.call('HDEL', event.account, 'plan', 'cap_nanousd')
  elseif p.budget and string.sub(kind, 1, 7) == 'credit-' then
    local state = read_lots(meta, p.budget)
    change_lots(state, kind, p.credit, math.abs(event.amount), p.expires_ms or 0, p.cap_nanousd,
      { s = p.settled_nanousd, h = p.held_nanousd })
    write_lots(meta, p.budget, state, event.amount)
  elseif kind == 'alert-raised' then
    redis.call('HSET', beside(meta, 'alerts'), p.budget .. ' ' .. p.fraction, event.id)
  elseif kind == 'credit-granted' or kind == 'credit-revoked' then
    local field = 'credit:' .. event.period
    redis.call('HSET', event.account, field, text(int(redis.call('HGET', event.account, field) or 0) + event.amount))
  elseif kind == 'policy-applied' then
    redis.call('HSET', keys[1], 'policy_version', text(p.version), 'policy_digest', p.digest, 'policy', event.values[10]) -- G11
    alert_rules[keys[1]] = nil
  elseif kind == 'budget-opened' then
    open_budget(meta, p)
  elseif kind == 'key-created' then
    write_key(beside(meta, 'keys'), event.id, p.hash, p.key_id, event.values[10])
  elseif kind == 'key-revoked' then
    local key = beside(meta, 'keys')
    local hash = redis.call('HGET', key, p.key_id)
    if hash then
      write_revocation(key, hash, event.values[10])
    end
  elseif kind == 'segment-sealed' then
    local last = string.match(p.segment, '%-0*(%d+)$')
    redis.call('HSET', keys[1], 'sealed_seq', last, 'sealed_chain', p.chain_after)
  end
  if ds + dh < 0 then
    wake(keys[4], event.names)
  end
  if APPLY[kind] then
    local call = APPLY[kind](read_call(event.call), event, p)
    if call then
      write_call(event.call, call, call.state ~= 'open' and ttl or nil) -- G4
    end
  end
end

--[[ restore: append lost events again under their own ids, and put back what they moved; for `tollbook recover`. Results
are in no event: a call that is over answers without one. Where a batch was appended before, the caller is told so.
KEYS meta ledger holds waiters, then of each event: account call tail...
ARGS 1 ledger_id 2 sequence number and 3 id of the event before the first 4 call ttl s 5 note of the recovery, kept in
     meta until it is over, then of each event: id step (record, or '' if a settlement or correction follows in the same
     step) number of budgets, the ten values of the envelope, then budgets "settled held name" as they were before
OK seq | MOVED seq (the ledger ends elsewhere) | DIVERGED budget and both balances, as any other function ]]
local function restore(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local newest = redis.call('XREVRANGE', keys[2], '+', '-', 'COUNT', 1)[1]
  local last = newest and newest[1] or redis.call('HGET', keys[1], 'removed_to') or '0-0'
  if meta.seq ~= int(args[2]) or last ~= args[3] then
    return { 'MOVED', text(meta.seq) }
  end
  local ttl, events, at, key_at, checked = seconds_of(args[4]), {}, 6, 5, {}
  local ms, n = parse_id(last)
  while at <= #args do
    local event_ms, event_n = parse_id(args[at])
    if not is_after(event_ms, event_n, ms, n) or args[at + 5] ~= text(meta.seq + #events + 1) then
      bug('not the next event: ' .. args[at])
    end
    ms, n = event_ms, event_n
    local event = { id = args[at], step = args[at + 1], values = {}, type = args[at + 3], user = args[at + 6],
      period = args[at + 7], call_id = args[at + 8], attempt = args[at + 9], amount = int(args[at + 10]),
      p = cjson.decode(args[at + 12]), account = keys[key_at], call = keys[key_at + 1], tails = {}, baselines = {},
      names = {} }
    for i = 3, 12 do
      event.values[i - 2] = args[at + i]
    end
    for i = 1, int(args[at + 2]) do
      local s, h, name = string.match(args[at + 12 + i], '^(%-?%d+) (%-?%d+) (%l[%w_~-]*:.*)$')
      local tail = keys[key_at + 1 + i]
      event.tails[i], event.baselines[i], event.names[i] = tail, { s = int(s), h = int(h) }, name
      local entry = not checked[tail] and redis.call('LINDEX', tail, -1)
      if entry then
        local b = balance_after(entry)
        if b.s ~= int(s) or b.h ~= int(h) then -- G8
          return { 'DIVERGED', name, s, h, text(b.s), text(b.h) }
        end
      end
      checked[tail] = true
    end
    at, key_at = at + 13 + #event.tails, key_at + 2 + #event.tails
    events[#events + 1] = event
  end
  redis.call('HSET', keys[1], 'recovering', args[5])
  for _, event in ipairs(events) do
    local v = event.values
    redis.call('XADD', keys[2], event.id, 'type', v[1], 'v', v[2], 'seq', v[3], 'user_id', v[4], 'period', v[5],
      'call_id', v[6], 'attempt', v[7], 'amount', v[8], 'committed', v[9], 'payload', v[10]) -- G7
    apply(meta, keys, event, ttl)
  end
  return { 'OK', text(meta.seq + #events) }
end

--[[ recovered: end a recovery by an event that says what was lost and what became of it, with reason and author.
KEYS meta ledger   ARGS 1 ledger_id 2 id of the newest event, as the caller knows it 3 payload
OK id | MOVED seq (the ledger has gone on) ]]
local function recovered(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local newest = redis.call('XREVRANGE', keys[2], '+', '-', 'COUNT', 1)[1]
  if (newest and newest[1] or '0-0') ~= args[2] then
    return { 'MOVED', text(meta.seq) }
  end
  local id = append(meta, keys[2], 'ledger-recovered', '', '', '', '0', 0, '', args[3])
  redis.call('HDEL', keys[1], 'recovering')
  return { 'OK', id }
end
