-- The ledger of a partition: what is known of it, balances at a position, and appending events.

-- Arguments from `from` on are budgets. Return their names, and the caps and baselines of those that have them.
local function read_budgets(args, from)
  local names, baselines = {}, {}
  for i = from, #args do
    local at = i - from + 1
    local cap, s, h, ms, n, seq, name =
      string.match(args[i], '^(%d+) (%-?%d+) (%-?%d+) (%d+) (%d+) (%d+) (%l[%w_~-]*:.*)$')
    if cap then
      names[at] = name
      baselines[at] = { cap = exact(cap, MAX_AMOUNT), s = exact(s), h = exact(h), ms = exact(ms), n = exact(n),
        seq = exact(seq) }
    elseif string.find(args[i], '^%l[%w_~-]*:') then
      names[at] = args[i]
    else
      bug('malformed budget: ' .. args[i])
    end
  end
  return names, baselines
end

-- Of an entry of a tail: its id, and how it moved settled and held. `balance_after` has what they were then.
local function parse_entry(entry)
  local ms, n, ds, dh, s, h = string.match(entry, '^(%d+)%-(%d+) (%-?%d+) (%-?%d+) (%-?%d+) (%-?%d+)$')
  return ms + 0, n + 0, ds + 0, dh + 0, s + 0, h + 0
end

-- The watermark moves rarely; it is parsed when it has moved.
local watermark, watermark_ms, watermark_n

-- Events that are known to be on the ledger, by ledger: those that were appended or found since it was last not as long
-- as the step before had left it. Whatever else changes it (a backup, a failover, another server's steps) leaves it longer
-- or shorter, and then nothing is known.
local known = {}
local MAX_KNOWN = 500 -- The newest ones are kept: so many, up to twice as many.

local function known_events(ledger, seq)
  local events = known[ledger]
  if not events or events.seq ~= seq then
    events = { seq = seq, count = 0, newest = {}, older = {} }
    known[ledger] = events
  end
  return events
end

local function add_known(events, id)
  if events.count == MAX_KNOWN then
    events.older, events.newest, events.count = events.newest, {}, 0
  end
  events.newest[id], events.count = true, events.count + 1
end

-- Whether an event that the caller was told of is still part of the ledger: on the stream, or archived off it.
local function has_event(meta, ledger, id)
  if meta.known.newest[id] or meta.known.older[id] then
    return true
  end
  if #redis.call('XRANGE', ledger, id, id, 'COUNT', 1) == 0 then
    local ms, n = parse_id(id)
    local removed_ms, removed_n = parse_id(meta.removed_to or '0-0')
    if is_after(ms, n, removed_ms, removed_n) then
      return false
    end
  end
  add_known(meta.known, id)
  return true
end

local function read_meta(key, ledger, given)
  local m = redis.call('HMGET', key, 'ledger_id', 'trimmed_to', 'removed', 'removed_to', 'stopped', 'policy_version')
  local ledger_id, seen, version = string.match(given, '^(%S+) ?(%S*) ?(%S*)$')
  if m[1] ~= ledger_id then -- G8
    return nil, { 'LEDGER', m[1] or '' }
  end
  if m[2] ~= watermark then
    watermark, watermark_ms, watermark_n = m[2], parse_id(m[2])
  end
  local seq = redis.call('XLEN', ledger) + m[3]
  local meta = { seq = seq, trim_ms = watermark_ms, trim_n = watermark_n, removed_to = m[4], stopped = m[5],
    known = known_events(ledger, seq), policy = m[6] or '0', version = version, ledger_id = ledger_id, key = key }
  if seen ~= '' and seen ~= '0-0' and not has_event(meta, ledger, seen) then -- G1 G4
    return nil, { 'BACK', seen }
  end
  return meta
end

-- A refusal where the caller decides by another policy than the one in force, compared as text.
local function other_policy(meta)
  if meta.version ~= meta.policy and not (meta.version == '' and meta.policy == '0') then -- G11
    return { 'POLICY', meta.policy }
  end
  return nil
end

-- Settled and held after an entry.
local function balance_after(entry)
  local s, h = string.match(entry, '^%S+ %S+ %S+ (%S+) (%S+)$')
  return { s = s + 0, h = h + 0 }
end

-- The tail's balance at position Q: after the newest entry at or before Q.
local function balance_at(key, q)
  local ms, n, ds, dh, s, h = parse_entry(redis.call('LINDEX', key, 0))
  if is_after(ms, n, q.ms, q.n) then
    return s - ds, h - dh
  end
  local low, high = 0, redis.call('LLEN', key) - 1
  while high - low > 1 do
    local middle = math.floor((low + high) / 2)
    local middle_ms, middle_n, _, _, middle_s, middle_h = parse_entry(redis.call('LINDEX', key, middle))
    if is_after(middle_ms, middle_n, q.ms, q.n) then
      high = middle
    else
      low, s, h = middle, middle_s, middle_h
    end
  end
  return s, h
end

-- The exact balance of a budget now, or a refusal: the baseline at Q plus the tail after Q.
local function balance(meta, key, name, q)
  if not q then
    bug('a budget without its baseline: ' .. name)
  end
  if q.seq > meta.seq then -- G8
    return nil, { 'AHEAD', text(q.seq), text(meta.seq) }
  end
  if is_after(meta.trim_ms, meta.trim_n, q.ms, q.n) then -- G6
    return nil, { 'STALE', name }
  end
  local newest = redis.call('LINDEX', key, -1)
  if not newest then
    return { s = q.s, h = q.h }
  end
  local ms, n, _, _, last_s, last_h = parse_entry(newest)
  local s, h = last_s, last_h
  if is_after(ms, n, q.ms, q.n) then
    s, h = balance_at(key, q)
  end
  if s ~= q.s or h ~= q.h then -- G8
    return nil, { 'DIVERGED', name, text(q.s), text(q.h), text(s), text(h) }
  end
  return { s = last_s, h = last_h }
end

-- The balance of a budget with an open hold. Its tail is never empty; the baseline is there in case it was lost.
local function known_balance(meta, key, name, baseline)
  local newest = redis.call('LINDEX', key, -1)
  if newest then
    return balance_after(newest)
  end
  if not baseline then
    return nil, { 'STALE', name }
  end
  return balance(meta, key, name, baseline)
end

local function known_committed(key)
  local newest = redis.call('LINDEX', key, -1)
  if not newest then
    return ''
  end
  local last = balance_after(newest)
  return text(last.s + last.h)
end

local function append(meta, ledger, kind, user, period, call_id, attempt, amount, committed, payload)
  meta.seq = meta.seq + 1
  local id = redis.call('XADD', ledger, '*', 'type', kind, 'v', '2', 'seq', meta.seq,
    'user_id', user, 'period', period, 'call_id', call_id, 'attempt', attempt,
    'amount', text(amount), 'committed', committed, 'payload', payload) -- G7
  meta.known.seq = meta.seq
  add_known(meta.known, id)
  return id
end

local function push(key, id, ds, dh, before)
  before.s, before.h = before.s + ds, before.h + dh
  redis.call('RPUSH', key, string.format('%s %d %d %d %d', id, ds, dh, exact(before.s), exact(before.h)))
end

-- Put the members that only the gate knows in front of a payload's own.
local function splice(stamps, payload)
  local members = table.concat(stamps, ',')
  if members == '' then
    return payload
  end
  return '{' .. members .. (payload == '{}' and '}' or ',' .. string.sub(payload, 2))
end

local function stamp_budgets(stamps, names, balances, caps, delta)
  if #names < 2 then
    return
  end
  local list = {}
  for i = 2, #names do
    local cap = caps and ',"cap_nanousd":' .. text(caps[i]) or ''
    list[#list + 1] = '{"budget":' .. cjson.encode(names[i]) .. cap ..
      ',"committed_nanousd":' .. text(balances[i].s + balances[i].h + delta) .. '}'
  end
  stamps[#stamps + 1] = '"budgets":[' .. table.concat(list, ',') .. ']'
end
