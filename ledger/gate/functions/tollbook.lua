#!lua name=tollbook_v2
--[[
The budget gate: the only writer of the ledger, its holds and its balances.

Every function runs as one atomic step. Each reads and decides first and writes last, and its first
write goes to a key that it has not read. So a key of the wrong type or a refused argument changes
nothing: Redis does not undo what a function wrote before an error. Amounts are integer
nano-dollars; they and their sums stay below 2^53, where a Lua number is exact. Time is the
Redis clock. A reply is an array: a code, then its values; ledger/gate/replies.py reads them.
A line that enforces a guarantee has its number as a comment, such as G1.

Keys, all with the hash tag of one partition:
  meta      hash   ledger_id, partitions, trimmed_to (the watermark), removed (events trimmed off the
                   stream: an event's sequence number is `removed` plus its place in the stream),
                   removed_to (id of the last of them), stopped (why no call may begin; absent while they may),
                   stopped_seen, stopped_at (the newest event that the projector had folded that stopped them, and
                   its data directory), projector, projector_epoch (whose word counts, and its lease's epoch),
                   recovering (the payload of the event that ends a recovery under way), policy_version, policy_digest
                   and policy (of the policy in force, the last one the payload of its event; absent: version 0)
  ledger    stream the events
  holds     zset   call id of each open hold -> its deadline in ms
  waiters   hash   budget -> 1 while a call waits for its holds to settle
  account   hash   plan, cap_nanousd, credit:<period> of one user, as the ledger assigned them
  call      string the record of one call, in lines (one write, and readable with GET; the only
                   other reader is ledger/gate/call_record.py):
                   1 state (open | closed | settled | denied), content hash, hold number,
                     amount held, worker, deadline ms, user, period, attempts recorded,
                     attempts begun, spent by recorded attempts of this hold, assumed part of it,
                     cap of the user's period, and the plan in force, as the latest hold found them
                   2 settled holds, each "number=cost,assumed"; if they stood against other budgets
                     than the latest hold, followed by a tab, their period, and their budgets, with
                     tabs between, and the character 1 for a space
                   3 marks of recorded attempt events (m1 f1 x2), so that a repeat adds none; while a hold is open,
                     "g1=provider=id" is the provider's id of attempt 1, once its reply has begun
                   4 the denial, "budget settled held cap amount reason"
                   5.. the budgets of the hold
  result    string the task's result as JSON
  credits   hash   budget -> its credit; "budget lots" -> what its credits have left, see `read_lots`
  alerts    hash   "budget fraction" -> id of the event that raised this alert
  keys      hash   of the gateway, in partition 0: hash of a key -> when it was created in ms, as `created_ms`, and what
                   it is bound to: the payload of its event; "hash revoked" -> the payload of the event that revoked it;
                   key id -> hash
  tail      list   of one budget: "id dS dH S H": deltas of settled and held, and both after it
credits and alerts are not among the KEYS: few calls need them, and every key has its price. They stand beside meta.
keys is, but for restore.

The first argument is "ledger_id seen version": the id of the newest event that the caller was ever told of, or 0-0, and
the version of the policy by which it decides. Where that event is neither on the stream nor archived, the ledger went
back in time, and nothing is written. The version is compared where money is decided about; who names none means 0.

A budget argument is "cap settled held q_ms q_n q_seq name": the cap, and the baseline folded at
ledger position Q (entry id q_ms-q_n, sequence number q_seq); or, where the baseline is needed only
if the tail is empty, the name alone ("user:u42:2026-11", "team-week~3:red:2026-W48"). Short values share one
argument: a client takes longer to pack one more argument than the server to split one.

Codes:
  OK        done; the values depend on the function
  EXISTS    done before, by an earlier call of the function with the same id
  CONFLICT  the id was used before with other content
  DENIED    settled spend and the amount pass the cap, or the wait is over: budget settled held cap
  WAIT      only open holds are in the way: budget settled held cap
  STALE     the baseline is older than the tail: budget
  AHEAD     the projection has folded events that the ledger does not have: folded seq, ledger seq
  DIVERGED  the baseline differs from the tail at the same position: budget, its settled and held, the tail's
  LEDGER    the keys belong to another ledger: its id
  BACK      the ledger lacks an event that the caller was told of: the event's id
  STOPPED   no call may begin: why
  POLICY    the caller decides by another policy than the one in force: the version of that one
  FENCED    a later projector has the lease: its name, and the epoch of its lease
  WINDOW    by the Redis clock, the request's period is over or has not begun: now in ms
  SETTLED   the hold is settled already: "cost assumed", state, and of settle also the newest event
  UNKNOWN   no such hold
  MISMATCH  the hold stands against other budgets: their names, by line
  MOVED     the ledger ends elsewhere than the caller says: its newest sequence number; of apply_policy, another
            policy is in force than the caller says: its version
  ORPHAN    there is a stream without the ledger's identity
  BEHIND    there are newer events than the caller has counted, or a window is over: the number of the newest
  CHANGED   the hold was corrected since the caller has read it: its cost and assumed part
  LESS      less credit is left than is to be taken back: what is left
  EARLY     by the Redis clock, the credit has not expired yet: now in ms
  NONE      the user has no assigned plan
  TAKEN     another key has this key id or this hash
  REVOKED   the key is revoked from no later than that: from when in ms
Every function whose first argument is the ledger's id, but create, may answer LEDGER and BACK. Beside these:
  reserve   OK EXISTS CONFLICT DENIED WAIT STALE AHEAD DIVERGED STOPPED POLICY WINDOW
  record    OK DENIED WAIT STALE AHEAD DIVERGED STOPPED POLICY SETTLED UNKNOWN MISMATCH
  note      OK UNKNOWN
  settle    OK STALE AHEAD DIVERGED SETTLED UNKNOWN MISMATCH
  adjust    OK STALE AHEAD DIVERGED UNKNOWN MISMATCH CHANGED
  release   OK EXISTS STALE AHEAD DIVERGED UNKNOWN MISMATCH CHANGED
  charge    OK EXISTS CONFLICT STALE AHEAD DIVERGED POLICY
  assign    OK EXISTS CONFLICT
  withdraw  OK EXISTS CONFLICT LESS NONE
  change_credit OK EXISTS CONFLICT LESS EARLY STALE AHEAD DIVERGED POLICY
  create_key OK EXISTS CONFLICT TAKEN
  revoke_key OK EXISTS CONFLICT UNKNOWN REVOKED
  trim      OK
  forget_alerts OK
  stop      OK FENCED
  create    OK ORPHAN
  restore   OK DIVERGED MOVED
  recovered OK MOVED
  balance   OK STALE AHEAD DIVERGED STOPPED POLICY
  apply_policy OK EXISTS MOVED BEHIND STOPPED
  probe     OK
What has been spent is booked all the same while calls are stopped: settle, adjust and charge never answer STOPPED.
renew, dead_letter, trim_tasks, remove_consumer and permissions answer without a code.
Programming errors are raised as error replies that begin with TOLLBOOK.
]]

local MAX_AMOUNT = 1000000 * 1000000000
local EXACT = 9007199254740992

local function bug(text)
  error({ err = 'TOLLBOOK ' .. text })
end

local function int(value)
  local n = tonumber(value)
  if not n or n % 1 ~= 0 or n >= EXACT or n <= -EXACT then
    bug('not an exact integer: ' .. tostring(value))
  end
  return n
end

local function amount_of(value)
  local n = int(value)
  if n < 0 or n > MAX_AMOUNT then
    bug('amount out of bounds: ' .. tostring(value))
  end
  return n
end

local function seconds_of(value)
  if int(value) <= 0 then
    bug('not a positive number of seconds: ' .. value)
  end
  return value
end

-- tostring() writes 1e+15; money is written out in full. `%d` is half the work of `%.0f`, and exact if
-- the server's `long` has 64 bits, which `create` checks.
local function text(n)
  if n >= EXACT or n <= -EXACT then
    bug('not an exact integer: ' .. n)
  end
  return string.format('%d', n)
end

local function now_ms()
  local t = redis.call('TIME')
  return int(t[1]) * 1000 + math.floor(int(t[2]) / 1000)
end

local function is_after(ms, n, other_ms, other_n)
  return ms > other_ms or (ms == other_ms and n > other_n)
end

local function parse_id(id)
  local ms, n = string.match(id, '^(%d+)%-(%d+)$')
  return tonumber(ms), tonumber(n)
end

-- Arguments from `from` on are budgets. Return their names, and the caps and baselines of those that have them.
local function read_budgets(args, from)
  local names, baselines = {}, {}
  for i = from, #args do
    local at = i - from + 1
    local cap, s, h, ms, n, seq, name =
      string.match(args[i], '^(%d+) (%-?%d+) (%-?%d+) (%d+) (%d+) (%d+) (%l[%w_~-]*:.*)$')
    if cap then
      names[at] = name
      baselines[at] = { cap = amount_of(cap), s = int(s), h = int(h), ms = int(ms), n = int(n), seq = int(seq) }
    elseif string.find(args[i], '^%l[%w_~-]*:') then
      names[at] = args[i]
    else
      bug('malformed budget: ' .. args[i])
    end
  end
  return names, baselines
end

local function parse_entry(entry)
  local ms, n, ds, dh, s, h = string.match(entry, '^(%d+)%-(%d+) (%-?%d+) (%-?%d+) (%-?%d+) (%-?%d+)$')
  return { ms = tonumber(ms), n = tonumber(n), ds = tonumber(ds), dh = tonumber(dh), s = tonumber(s), h = tonumber(h) }
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

-- The commands of one batch bear few different first arguments; each is parsed once.
local identities, identities_kept = {}, 0

local function identity_of(given)
  local found = identities[given]
  if not found then
    if identities_kept == 16 then
      identities, identities_kept = {}, 0
    end
    found = {}
    found.ledger_id, found.seen, found.version = string.match(given, '^(%S+) ?(%S*) ?(%S*)$')
    identities[given], identities_kept = found, identities_kept + 1
  end
  return found
end

local function read_meta(key, ledger, given)
  local m = redis.call('HMGET', key, 'ledger_id', 'trimmed_to', 'removed', 'removed_to', 'stopped', 'policy_version')
  local who = identity_of(given)
  if m[1] ~= who.ledger_id then -- G8
    return nil, { 'LEDGER', m[1] or '' }
  end
  if m[2] ~= watermark then
    watermark, watermark_ms, watermark_n = m[2], parse_id(m[2])
  end
  local seq = redis.call('XLEN', ledger) + int(m[3])
  local meta = { seq = seq, trim_ms = watermark_ms, trim_n = watermark_n, removed_to = m[4], stopped = m[5],
    known = known_events(ledger, seq), policy = m[6] or '0', version = who.version, ledger_id = who.ledger_id, key = key }
  if who.seen ~= '' and who.seen ~= '0-0' and not has_event(meta, ledger, who.seen) then -- G1 G4
    return nil, { 'BACK', who.seen }
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
  return { s = tonumber(s), h = tonumber(h) }
end

-- The tail's balance at position Q: after the newest entry at or before Q.
local function balance_at(key, q, last)
  if not is_after(last.ms, last.n, q.ms, q.n) then
    return last.s, last.h
  end
  local first = parse_entry(redis.call('LINDEX', key, 0))
  if is_after(first.ms, first.n, q.ms, q.n) then
    return first.s - first.ds, first.h - first.dh
  end
  local low, high, at = 0, redis.call('LLEN', key) - 1, first
  while high - low > 1 do
    local middle = math.floor((low + high) / 2)
    local entry = parse_entry(redis.call('LINDEX', key, middle))
    if is_after(entry.ms, entry.n, q.ms, q.n) then
      high = middle
    else
      low, at = middle, entry
    end
  end
  return at.s, at.h
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
  local last = parse_entry(newest)
  local s, h = balance_at(key, q, last)
  if s ~= q.s or h ~= q.h then -- G8
    return nil, { 'DIVERGED', name, text(q.s), text(q.h), text(s), text(h) }
  end
  return last
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
  local id = redis.call('XADD', ledger, '*', 'type', kind, 'v', '2', 'seq', text(meta.seq),
    'user_id', user, 'period', period, 'call_id', call_id, 'attempt', attempt,
    'amount', text(amount), 'committed', committed, 'payload', payload) -- G7
  meta.known.seq = meta.seq
  add_known(meta.known, id)
  return id
end

local function push(key, id, ds, dh, before)
  before.s, before.h = before.s + ds, before.h + dh
  redis.call('RPUSH', key, id .. string.format(' %d %d ', ds, dh) .. text(before.s) .. ' ' .. text(before.h))
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

-- One pattern and one format for the whole record: string work is most of what a step costs.
local CALL_HEAD = '^(%S+) (%S+) (%d+) (%d+) (%S+) (%d+) ([^\n]+) (%S+) (%d+) (%d+) (%d+) (%d+)'
local CALL_LINES = '\n([^\n]*)\n([^\n]*)\n([^\n]*)\n(.*)$'
local CALL_PATTERN = CALL_HEAD .. ' (%d+) (%S+)' .. CALL_LINES
local OLD_CALL_PATTERN = CALL_HEAD .. CALL_LINES
local CALL_FORMAT = '%s %s %d %d %s %s %s %s %d %d %d %d %d %s\n%s\n%s\n%s\n%s'

local function read_call(key)
  local value = redis.call('GET', key)
  if not value then
    return nil
  end
  local state, hash, hold, amount, worker, deadline, user, period, recorded, begun, spent, assumed,
    cap, plan, settled, marks, denial, budgets = string.match(value, CALL_PATTERN)
  if not state then -- As it was written before there were alerts.
    cap, plan = '0', '-'
    state, hash, hold, amount, worker, deadline, user, period, recorded, begun, spent, assumed,
      settled, marks, denial, budgets = string.match(value, OLD_CALL_PATTERN)
  end
  return { state = state, hash = hash, hold = tonumber(hold), amount = tonumber(amount), worker = worker,
    deadline = deadline, user = user, period = period, recorded = tonumber(recorded), begun = tonumber(begun),
    spent = tonumber(spent), assumed = tonumber(assumed), cap = tonumber(cap), plan = plan, settled = settled, marks = marks, denial = denial, budgets = budgets }
end

local function new_call(hash, worker, user, period)
  return { hash = hash, hold = 0, amount = 0, worker = worker, deadline = '0', user = user, period = period,
    recorded = 0, begun = 0, spent = 0, assumed = 0, cap = 0, plan = '-', settled = '', marks = ' ', denial = '', budgets = '' }
end

local function write_call(key, c, ttl)
  local value = string.format(CALL_FORMAT, c.state, c.hash, c.hold, c.amount, c.worker, c.deadline, c.user,
    c.period, c.recorded, c.begun, c.spent, c.assumed, c.cap, c.plan, c.settled, c.marks, c.denial, c.budgets)
  if ttl then
    redis.call('SET', key, value, 'EX', ttl)
  else
    redis.call('SET', key, value)
  end
end

-- Cost, assumed part, period and budgets of a settled hold, or nil.
local function settled_hold(call, hold)
  if call.settled == '' then
    return nil
  end
  local cost, assumed, place = string.match(call.settled, ' ' .. hold .. '=(%d+),(%d+)([^ ]*)')
  if not cost or place == '' then
    return cost, assumed, call.period, call.budgets
  end
  local period, budgets = string.match(place, '^\t([^\t]*)\t(.*)$')
  return cost, assumed, period, (string.gsub(budgets, '[\t\1]', { ['\t'] = '\n', ['\1'] = ' ' }))
end

local function set_settled(call, hold, cost, assumed)
  local others, place = call.settled, ''
  if others ~= '' then
    place = string.match(others, ' ' .. hold .. '=%d+,%d+([^ ]*)') or ''
    others = string.gsub(others, ' ' .. hold .. '=%d+,%d+[^ ]*', '')
  end
  call.settled = others .. ' ' .. hold .. '=' .. text(cost) .. ',' .. text(assumed) .. place
end

-- The next hold may be in another period. Earlier holds keep theirs: they are corrected where they were booked.
local function move_call(call, period, budgets)
  if call.settled ~= '' and (call.period ~= period or call.budgets ~= budgets) then
    local budgets = string.gsub(call.budgets, '[\n ]', { ['\n'] = '\t', [' '] = '\1' })
    local place = '\t' .. call.period .. '\t' .. budgets
    local settled = string.gsub(call.settled .. ' ', '(=%d+,%d+) ', function(numbers)
      return numbers .. place .. ' '
    end)
    call.settled = string.sub(settled, 1, -2)
  end
  call.period, call.budgets = period, budgets
end

-- Forget the provider's id of a request: the next one has its own.
local function forget_id(call)
  if string.find(call.marks, ' g', 1, true) then
    call.marks = string.gsub(call.marks, ' g%S+', '')
  end
end

-- Set a mark; return whether it is new.
local function mark(call, name)
  if string.find(call.marks, ' ' .. name .. ' ', 1, true) then -- G4
    return false
  end
  call.marks = call.marks .. name .. ' '
  return true
end

local function tails_of(keys, from)
  local tails = {}
  for i = from, #keys do
    tails[#tails + 1] = keys[i]
  end
  return tails
end

-- Events of attempts, three arguments each: type, attempt, payload. Each is appended once.
local MARKS = { ['model-called'] = 'm', ['fallback-used'] = 'f' }

local function read_attempts(args, from, count)
  local events = {}
  for i = from, from + 3 * (count - 1), 3 do
    if not MARKS[args[i]] then
      bug('not an event of an attempt: ' .. tostring(args[i]))
    end
    events[#events + 1] = { type = args[i], attempt = text(int(args[i + 1])), payload = args[i + 2] }
  end
  return events
end

local function append_attempts(meta, ledger, call, call_id, period, events, committed)
  for _, event in ipairs(events) do
    if mark(call, MARKS[event.type] .. event.attempt) then
      append(meta, ledger, event.type, call.user, period, call_id, event.attempt, 0, committed, event.payload)
      if event.type == 'model-called' then
        call.recorded = math.max(call.recorded, int(event.attempt))
      end
    end
  end
end

-- An announcement is a favour to those who wait; they also look by themselves. A user who may not use the channel
-- must not make an error of a step that has booked money.
local function announce(channel, message)
  redis.pcall('PUBLISH', channel, message) -- G3
end

local function wake(waiters, names)
  for _, name in ipairs(names) do
    if redis.call('HDEL', waiters, name) == 1 then
      announce(waiters, name)
    end
  end
end

-- The cap in force for the user's period, and the assigned plan or '': the cap is the one that the ledger assigned,
-- or else the caller's, with credit on top.
local function cap_in_force(account, period, cap)
  local a = redis.call('HMGET', account, 'cap_nanousd', 'credit:' .. period, 'plan')
  return math.min(int(a[1] or cap) + int(a[2] or 0), MAX_AMOUNT), a[3] or ''
end

-- The plan in the caller's payload is the one that the task names; the assigned one is stamped beside it.
local function stamp_plan(stamps, plan)
  if plan ~= '' then
    stamps[#stamps + 1] = '"assigned_plan":' .. cjson.encode(plan)
  end
end

-- What the id of a call or command is bound to: a recovered ledger must still tell a repeat from other content.
local function stamp_hash(stamps, hash)
  stamps[#stamps + 1] = '"content_hash":' .. cjson.encode(hash)
end

-- The name of a key of the same partition that stands beside meta.
local function beside(meta, name)
  return string.sub(meta.key, 1, -5) .. name
end

-- The credit of a budget whose balance never begins anew; others have none.
local function credit_of(meta, name)
  if string.sub(name, -6) ~= ':total' then
    return 0
  end
  return int(redis.call('HGET', beside(meta, 'credits'), name) or 0)
end

-- Compare every budget's balance and `amount` with its cap. A budget of which settled spend alone leaves no room
-- denies the call; one in which only open holds are in the way makes it wait.
local function weigh(meta, tails, names, baselines, account, period, amount)
  local balances, caps, plan, denied, waiting = {}, {}, '', nil, nil
  for i, name in ipairs(names) do
    local b, refusal = balance(meta, tails[i], name, baselines[i])
    if not b then
      return nil, refusal
    end
    local cap = baselines[i].cap
    if i == 1 then
      cap, plan = cap_in_force(account, period, cap)
    else
      cap = math.min(cap + credit_of(meta, name), MAX_AMOUNT)
    end
    balances[i], caps[i] = b, cap
    if amount > 0 and b.s + amount > cap then -- G1 G9
      denied = denied or i
    elseif amount > 0 and b.s + b.h + amount > cap then -- G1 G9
      waiting = waiting or i
    end
  end
  return { balances = balances, caps = caps, plan = plan, denied = denied, waiting = waiting }
end

local function verdict(code, names, w, i)
  local b = w.balances[i]
  return { code, names[i], text(b.s), text(b.h), text(w.caps[i]) }
end

-- Fractions of a cap as the policy writes them, such as "0.8", with their ten-thousandths.
local function read_fractions(texts)
  local fractions = {}
  for _, fraction in ipairs(texts or {}) do
    fractions[#fractions + 1] = { text = fraction, parts = math.floor(tonumber(fraction) * 10000 + 0.5) }
  end
  return #fractions > 0 and fractions or nil
end

-- Dollars as the policy writes them, such as "20.5", in nano-dollars.
local function nanousd(dollars)
  local whole, rest = string.match(dollars, '^(%d+)%.?(%d*)$')
  return int(whole) * 1000000000 + int(string.sub(rest .. '000000000', 1, 9))
end

-- The alerts of the policy in force, by the key of its ledger's meta: read from there when the version has changed.
local alert_rules = {}

-- By budget, its caps and fractions; by plan, the fractions of its users' own budgets. Nil where there are none.
local function make_alert_rules(payload)
  local content, rules, has_any = payload.content or {}, { budgets = {}, plans = {} }, false
  for _, budget in ipairs(content.budgets or {}) do
    local since = (payload.definitions or {})[budget.name] or 1
    local fractions = read_fractions(budget.alerts)
    if fractions then
      local caps = {}
      for value, cap in pairs(budget.caps or {}) do
        caps[value] = nanousd(cap)
      end
      rules.budgets[since > 1 and budget.name .. '~' .. since or budget.name] =
        { fractions = fractions, cap = nanousd(budget.cap_usd), caps = caps }
      has_any = true
    end
  end
  for name, plan in pairs(content.plans or {}) do
    rules.plans[name] = read_fractions(plan.alerts)
    has_any = has_any or rules.plans[name] ~= nil
  end
  return has_any and rules or nil
end

-- The rules of the policy in force. A policy that somebody has broken by hand raises no alert: what was spent is booked
-- all the same, and the projector stops calls.
local function read_alert_rules(meta)
  local kept = alert_rules[meta.key]
  if kept and kept.version == meta.policy and kept.ledger_id == meta.ledger_id then
    return kept.rules
  end
  local rules
  if meta.policy ~= '0' then
    local policy = redis.call('HGET', meta.key, 'policy')
    local is_whole, found = pcall(function() return make_alert_rules(cjson.decode(policy)) end)
    rules = is_whole and found or nil -- G3
  end
  alert_rules[meta.key] = { version = meta.policy, ledger_id = meta.ledger_id, rules = rules }
  return rules
end

-- Alerts of a budget that settled spend has reached, and of a refusal those of its whole cap, but for those raised
-- before: each once for a budget, its window included. To be appended by `append_alerts`, after the event that moved
-- money, since a step reads first.
local function add_alerts(due, meta, name, fractions, cap, settled, is_refusal)
  local reached = {}
  for _, fraction in ipairs(fractions) do
    local threshold = math.floor(cap / 10000) * fraction.parts + math.ceil(cap % 10000 * fraction.parts / 10000)
    if (cap > 0 and settled >= threshold) or (is_refusal and fraction.parts == 10000) then
      reached[#reached + 1] = name .. ' ' .. fraction.text
    end
  end
  if #reached == 0 then
    return
  end
  local raised = redis.call('HMGET', beside(meta, 'alerts'), unpack(reached))
  for i, field in ipairs(reached) do
    if not raised[i] then
      due[#due + 1] = { field = field, budget = name, fraction = string.match(field, ' (%S+)$'), cap = cap,
        settled = settled }
    end
  end
end

local NONE = {}

-- The plan in force, where the policy has alerts that need it, else '-': the ledger's, or the one that the payload names.
local function plan_for_alerts(meta, assigned, payload)
  if not read_alert_rules(meta) then
    return '-'
  end
  return assigned ~= '' and assigned or string.match(payload, '"plan":"([^"]*)"') or '-'
end

-- The alerts that are due once `delta` is added to settled spend. `cap` and `plan` are of the user's own budget, which
-- is the first one; without a plan it is left out.
local function due_alerts(meta, names, balances, delta, cap, plan)
  local rules = read_alert_rules(meta)
  if not rules then
    return NONE
  end
  local due = {}
  for i, name in ipairs(names) do
    if i == 1 then
      if rules.plans[plan] then
        add_alerts(due, meta, name, rules.plans[plan], cap, balances[i].s + delta)
      end
    else
      local budget, value = string.match(name, '^([^:]*):(.*):[^:]*$')
      local rule = rules.budgets[budget]
      if rule then
        local own_cap = math.min((rule.caps[value] or rule.cap) + credit_of(meta, name), MAX_AMOUNT)
        add_alerts(due, meta, name, rule.fractions, own_cap, balances[i].s + delta)
      end
    end
  end
  return due
end

-- The alert of a refusal: the first one at a budget's cap, whatever is settled.
local function due_refusal_alerts(meta, names, w, refused, plan)
  local rules, due = read_alert_rules(meta), {}
  if rules then
    local rule = rules.budgets[string.match(names[refused], '^([^:]*):')]
    local fractions = refused == 1 and rules.plans[plan] or refused > 1 and rule and rule.fractions
    if fractions then
      add_alerts(due, meta, names[refused], fractions, w.caps[refused], w.balances[refused].s, true)
    end
  end
  return due
end

local function append_alerts(meta, ledger, due, call_id)
  for _, alert in ipairs(due) do
    local id = append(meta, ledger, 'alert-raised', '', '', '', '0', 0, '', '{"kind":"budget","budget":' ..
      cjson.encode(alert.budget) .. ',"window":' .. cjson.encode(string.match(alert.budget, '[^:]*$')) ..
      ',"fraction":"' .. alert.fraction .. '","cap_nanousd":' .. text(alert.cap) .. ',"settled_nanousd":' ..
      text(alert.settled) .. ',"cause":' .. cjson.encode(call_id) .. '}')
    redis.call('HSET', beside(meta, 'alerts'), alert.field, id)
  end
end

-- The newest event on the stream ('': none). Who finds that something was done before is told it, and so of the event
-- that did it: from then on it is missed where the ledger goes back in time.
local function newest(ledger)
  local entries = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', 1)
  return entries[1] and entries[1][1] or ''
end

local function exists(call, result_key, ledger)
  if call.state == 'open' then
    return { 'EXISTS', 'open', text(call.hold), text(call.amount), call.worker, call.deadline,
      text(call.recorded), text(call.begun), text(call.spent), text(call.assumed), call.budgets, call.period,
      string.match(call.marks, ' g' .. text(call.begun) .. '=(%S+)') or '', newest(ledger) }
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
  local user, period, hash, worker, amount, lease, from, til, final, ttl =
    string.match(args[3], '^(.+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) ([012]) (%S+)$')
  amount, lease, from, til, ttl = amount_of(amount), int(lease), int(from), int(til), seconds_of(ttl)
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
  local attempt = math.max(call.recorded, call.begun) + 1
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
    append(meta, keys[2], 'budget-denied', user, period, call_id, text(attempt), amount,
      text(w.balances[1].s + w.balances[1].h), splice(stamps, args[4]))
    call.state = 'denied'
    call.denial = table.concat({ names[refused], text(b.s), text(b.h), text(w.caps[refused]), text(amount), reply[6] }, ' ')
    write_call(call_key, call, ttl)
    append_alerts(meta, keys[2], due, call_id)
    return reply
  end
  local hold, deadline = call.hold + 1, text(now + lease)
  local committed = text(w.balances[1].s + w.balances[1].h + amount)
  local stamps = { '"hold":' .. text(hold), '"cap_nanousd":' .. text(w.caps[1]), '"deadline_ms":' .. deadline }
  stamp_plan(stamps, w.plan)
  stamp_hash(stamps, hash)
  stamp_budgets(stamps, names, w.balances, w.caps, amount)
  redis.call('ZADD', keys[3], deadline, call_id) -- G3
  local id = append(meta, keys[2], 'budget-reserved', user, period, call_id, text(attempt), amount, committed,
    splice(stamps, args[4]))
  for i, tail in ipairs(tails) do
    push(tail, id, 0, amount, w.balances[i])
  end
  call.state, call.hold, call.amount, call.worker, call.deadline = 'open', hold, amount, worker, deadline
  call.begun, call.spent, call.assumed = attempt, 0, 0
  call.cap, call.plan = w.caps[1], plan_for_alerts(meta, w.plan, args[4])
  move_call(call, period, table.concat(names, '\n'))
  write_call(call_key, call)
  return { 'OK', id, text(hold), text(attempt), committed, text(w.caps[1]), deadline, w.plan }
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
  if call.state ~= 'open' or text(call.hold) ~= hold then -- G2
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
  if begun < call.begun or spent < call.spent then -- G3
    return { 'OK', '', text(call.amount) }
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
  call.spent, call.assumed = spent, assumed
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
    call.amount = call.amount + extension
  end
  call.begun = begun -- G3
  write_call(keys[4], call)
  return { 'OK', id, text(call.amount) }
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
  if not call or call.state ~= 'open' or text(call.hold) ~= args[2] then
    return { 'UNKNOWN' }
  end
  if attempt == call.begun then -- G3
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
    string.match(args[3], '^(%d+) (%S+) (%S+) (%S+) ([01]) (%S+) (%S+) (%S+)$')
  cost, assumed, attempt, count = amount_of(cost), amount_of(assumed), text(int(attempt)), int(count)
  result_ttl, call_ttl = seconds_of(result_ttl), seconds_of(call_ttl)
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
  local due = due_alerts(meta, names, balances, cost, call.cap, call.plan)
  wake(keys[4], names)
  redis.call('ZREM', keys[3], args[2])
  append_attempts(meta, keys[2], call, args[2], call.period, events, text(balances[1].s + balances[1].h))
  local freed = cost - call.amount
  local stamps = { '"hold":' .. hold, '"hold_nanousd":' .. text(call.amount) }
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
    push(tail, id, cost, -call.amount, balances[i])
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
  local due = difference > 0 and due_alerts(meta, names, balances, difference, call.cap, period == call.period and call.plan)
  if difference < 0 then
    wake(keys[3], names)
  end
  append_attempts(meta, keys[2], call, args[2], period, events, text(balances[1].s + balances[1].h))
  is_over = is_over == '1'
  local ends = (is_over or args[7] ~= '') and call.state == 'closed' and text(call.hold) == args[3]
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
  call.state, call.budgets, call.cap, call.plan = 'settled', table.concat(names, '\n'), cap, plan
  set_settled(call, '0', cost, assumed)
  write_call(keys[3], call, ttl)
  return { 'OK', id, committed }
end

-- The answer to a command that was given before, or nil.
local function repeated(command, hash, ledger)
  if not command then
    return nil
  end
  return command.hash == hash and { 'EXISTS', newest(ledger) } or { 'CONFLICT' } -- G4
end

-- Keep the record of a command, by which a repeat of it is known.
local function write_command(key, hash, user, period, ttl)
  local command = new_call(hash, '-', user, period)
  command.state = 'settled'
  write_call(key, command, ttl)
end

--[[ assign: change a user's plan, cap or credit, in force from this step on.
KEYS meta ledger account call tail
ARGS 1 ledger_id 2 command id 3 user_id 4 period 5 content hash 6 type 7 plan ('' for credit)
     8 cap, or credit to add, in nano-dollars 9 command ttl s 10 payload
OK id | EXISTS | CONFLICT ]]
local function assign(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  refusal = repeated(read_call(keys[4]), args[5], keys[2])
  if refusal then
    return refusal
  end
  local amount, ttl, credit = amount_of(args[8]), seconds_of(args[9]), args[6] == 'credit-granted'
  local granted = int(redis.call('HGET', keys[3], 'credit:' .. args[4]) or 0)
  if credit and granted + amount > MAX_AMOUNT then
    bug('credit out of bounds: ' .. text(granted + amount))
  end
  local stamps = {}
  stamp_hash(stamps, args[5])
  local id = append(meta, keys[2], args[6], args[3], args[4], args[2], '0', credit and amount or 0,
    known_committed(keys[5]), splice(stamps, args[10]))
  if credit then
    redis.call('HSET', keys[3], 'credit:' .. args[4], text(granted + amount))
  else
    redis.call('HSET', keys[3], 'plan', args[7], 'cap_nanousd', text(amount))
  end
  write_command(keys[4], args[5], args[3], args[4], ttl)
  return { 'OK', id }
end

--[[ withdraw: take back credit of a period, or a user's assigned plan and cap; in force from this step on.
KEYS meta ledger account call tail
ARGS 1 ledger_id 2 command id 3 user_id 4 period 5 content hash 6 type 7 credit to take back, in nano-dollars
     8 command ttl s 9 payload
OK id | EXISTS newest | CONFLICT | LESS credit (there is less than that) | NONE (no plan is assigned) ]]
local function withdraw(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  refusal = repeated(read_call(keys[4]), args[5], keys[2])
  if refusal then
    return refusal
  end
  local amount, ttl, is_credit = amount_of(args[7]), seconds_of(args[8]), args[6] == 'credit-revoked'
  local granted = int(redis.call('HGET', keys[3], 'credit:' .. args[4]) or 0)
  if is_credit and amount > granted then
    return { 'LESS', text(granted) }
  elseif not is_credit and redis.call('HEXISTS', keys[3], 'plan') == 0 then
    return { 'NONE' }
  end
  local stamps = {}
  stamp_hash(stamps, args[5])
  local id = append(meta, keys[2], args[6], args[3], args[4], args[2], '0', is_credit and -amount or 0,
    known_committed(keys[5]), splice(stamps, args[9]))
  if is_credit then
    redis.call('HSET', keys[3], 'credit:' .. args[4], text(granted - amount))
  else
    redis.call('HDEL', keys[3], 'plan', 'cap_nanousd')
  end
  write_command(keys[4], args[5], args[3], args[4], ttl)
  return { 'OK', id }
end

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

-- What the credits of a budget have left, as far as its spend was taken from them: `used` of it. Each lot: id, amount,
-- left, when it expires in ms (0: never). The hash's field has the same, in lines.
local function read_lots(meta, name)
  local state = { used = 0, lots = {} }
  local value = redis.call('HGET', beside(meta, 'credits'), name .. ' lots')
  for line in string.gmatch(value or '', '[^\n]+') do
    local id, amount, left, expires = string.match(line, '^(.+) (%d+) (%d+) (%d+)$')
    if id then
      state.lots[#state.lots + 1] = { id = id, amount = tonumber(amount), left = tonumber(left), expires = tonumber(expires) }
    else
      state.used = int(line)
    end
  end
  return state
end

local function write_lots(meta, name, state, change)
  local lines = { text(state.used) }
  for _, lot in ipairs(state.lots) do
    lines[#lines + 1] = lot.id .. ' ' .. text(lot.amount) .. ' ' .. text(lot.left) .. ' ' .. text(lot.expires)
  end
  local key = beside(meta, 'credits')
  redis.call('HSET', key, name, text(int(redis.call('HGET', key, name) or 0) + change),
    name .. ' lots', table.concat(lines, '\n'))
end

-- Take spend beyond the cap from the credit that expires first, those without an end last; what a correction gave back
-- returns in the opposite order. Which credits there are changes only by steps that do this first, so it is exact.
local function use_lots(state, spend)
  local rest = spend - state.used
  for i = 1, #state.lots do
    local lot = state.lots[rest > 0 and i or #state.lots + 1 - i]
    local part = rest > 0 and math.min(rest, lot.left) or math.max(rest, lot.left - lot.amount)
    lot.left, state.used, rest = lot.left - part, state.used + part, rest - part
  end
end

local function expires_before(lot, other)
  return lot.expires ~= other.expires and lot.expires ~= 0 and (other.expires == 0 or lot.expires < other.expires)
end

-- Put a credit's lot where it is used in turn: after those that expire no later.
local function add_lot(state, lot)
  local at = #state.lots + 1
  while at > 1 and expires_before(lot, state.lots[at - 1]) do
    at = at - 1
  end
  table.insert(state.lots, at, lot)
end

-- Change a budget's credits by what an event says, and return by how much its credit changes; nil and what is left where
-- less is left than is to be taken back (0: whatever is left). What open holds may need of a credit that expires stays:
-- it was promised to their calls.
local function change_lots(state, kind, id, amount, expires, cap, b)
  local before, after = math.max(0, b.s - cap), math.max(0, b.s + b.h - cap)
  use_lots(state, before)
  if kind == 'credit-granted' then
    add_lot(state, { id = id, amount = amount, left = amount, expires = expires })
    return amount
  end
  for i, lot in ipairs(state.lots) do
    if lot.id == id then
      if amount > lot.left and kind == 'credit-revoked' then
        return nil, lot.left
      end
      local taken = amount == 0 and lot.left or amount
      if kind == 'credit-expired' then
        taken = math.max(0, lot.left - (after - before))
      end
      lot.left, lot.amount = lot.left - taken, lot.amount - taken
      if lot.left == 0 then
        table.remove(state.lots, i)
      end
      return -taken
    end
  end
  if kind == 'credit-revoked' then
    return nil, 0
  end
  return 0
end

--[[ change_credit: grant credit to a budget with window `total`, take what is left of one back, or let it expire.
KEYS meta ledger waiters call tail
ARGS 1 ledger_id 2 command id 3 content hash 4 type 5 id of the credit 6 amount (granted, or to be taken back; 0: what is left)
     7 when it expires in ms (0: never; of an expiry, when it did) 8 command ttl s 9 payload 10 budget with its baseline
OK id change | EXISTS newest | CONFLICT | LESS left (less of the credit is left than that, or nothing)
| EARLY now | POLICY version ]]
local function change_credit(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  refusal = repeated(read_call(keys[4]), args[3], keys[2]) or other_policy(meta)
  if refusal then
    return refusal
  end
  local kind, id, amount, expires, ttl = args[4], args[5], amount_of(args[6]), int(args[7]), seconds_of(args[8])
  local now = now_ms()
  if kind == 'credit-expired' and now < expires then
    return { 'EARLY', text(now) }
  end
  local names, baselines = read_budgets(args, 10)
  local name, b = names[1], nil
  b, refusal = balance(meta, keys[5], name, baselines[1])
  if not b then
    return refusal
  end
  local cap, state = baselines[1].cap, read_lots(meta, name)
  local change, left = change_lots(state, kind, id, amount, expires, cap, b)
  if not change or (kind == 'credit-revoked' and change == 0) then
    return { 'LESS', text(left or 0) }
  elseif credit_of(meta, name) + change > MAX_AMOUNT then
    bug('credit out of bounds: ' .. text(credit_of(meta, name) + change))
  end
  local stamps = { '"budget":' .. cjson.encode(name), '"cap_nanousd":' .. text(cap), '"settled_nanousd":' .. text(b.s),
    '"held_nanousd":' .. text(b.h) }
  stamp_hash(stamps, args[3])
  if change > 0 then
    wake(keys[3], names)
  end
  local event = append(meta, keys[2], kind, '', '', args[2], '0', change, '', splice(stamps, args[9]))
  write_lots(meta, name, state, change)
  write_command(keys[4], args[3], '-', '-', ttl)
  return { 'OK', event, text(change) }
end

-- What the keys' hash has of a key that an event creates, under its hash and its id; and of one that is revoked.
local function write_key(key, event_id, hash, key_id, payload)
  local ms = parse_id(event_id)
  redis.call('HSET', key, hash, splice({ '"created_ms":' .. text(ms) }, payload), key_id, hash)
end

local function write_revocation(key, hash, payload)
  redis.call('HSET', key, hash .. ' revoked', payload)
end

--[[ create_key: make a key of the gateway known by its hash, from this step on.
KEYS meta ledger call keys
ARGS 1 ledger_id 2 command id 3 content hash 4 key id 5 hash of the key 6 command ttl s 7 payload
OK id | EXISTS own (1: it is this key that was created) newest | CONFLICT | TAKEN ]]
local function create_key(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local key_id, hash, ttl = args[4], args[5], seconds_of(args[6])
  if not string.find(key_id, '^key%-%x+$') or #hash ~= 64 or string.find(hash, '[^%da-f]') then
    bug('not a key: ' .. key_id)
  end
  local known = redis.call('HMGET', keys[4], key_id, hash)
  refusal = repeated(read_call(keys[3]), args[3], keys[2])
  if refusal and refusal[1] == 'EXISTS' then
    return { 'EXISTS', known[1] == hash and '1' or '0', refusal[2] } -- G4
  elseif refusal then
    return refusal
  elseif known[1] or known[2] then
    return { 'TAKEN' }
  end
  local stamps = {}
  stamp_hash(stamps, args[3])
  local payload = splice(stamps, args[7])
  local id = append(meta, keys[2], 'key-created', '', '', args[2], '0', 0, '', payload)
  write_key(keys[4], id, hash, key_id, payload)
  write_command(keys[3], args[3], '-', '-', ttl)
  return { 'OK', id }
end

--[[ revoke_key: let a key of the gateway be accepted no more, now or after a time. A key that is to end later can still
be revoked at once, not the other way round.
KEYS meta ledger call keys
ARGS 1 ledger_id 2 command id 3 content hash 4 key id 5 after so many ms 6 command ttl s 7 payload
OK id from-ms | EXISTS from-ms|'' newest | CONFLICT | UNKNOWN | REVOKED from-ms ]]
local function revoke_key(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local after_ms, ttl, key = int(args[5]), seconds_of(args[6]), keys[4]
  local hash = redis.call('HGET', key, args[4])
  local before = hash and redis.call('HGET', key, hash .. ' revoked')
  local before_ms = before and int(cjson.decode(before).at_ms)
  refusal = repeated(read_call(keys[3]), args[3], keys[2])
  if refusal and refusal[1] == 'EXISTS' then
    return { 'EXISTS', before_ms and text(before_ms) or '', refusal[2] } -- G4
  elseif refusal then
    return refusal
  elseif not hash then
    return { 'UNKNOWN' }
  end
  local at_ms = now_ms() + math.max(0, after_ms)
  if before_ms and before_ms <= at_ms then
    return { 'REVOKED', text(before_ms) }
  end
  local stamps = { '"at_ms":' .. text(at_ms) }
  stamp_hash(stamps, args[3])
  local payload = splice(stamps, args[7])
  local id = append(meta, keys[2], 'key-revoked', '', '', args[2], '0', 0, '', payload)
  write_revocation(key, hash, payload)
  write_command(keys[3], args[3], '-', '-', ttl)
  return { 'OK', id, text(at_ms) }
end

--[[ forget_alerts: forget which alerts were raised in windows that are long over.
KEYS meta ledger alerts   ARGS 1 ledger_id 2.. fields
OK number ]]
local function forget_alerts(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  return { 'OK', text(redis.call('HDEL', keys[3], unpack(args, 2))) }
end

--[[ trim: move the watermark, then drop the folded entries of the named tails at or below it.
The newest entry stays while it carries an open hold, so that its settlement finds the balance.
KEYS meta ledger tail...   ARGS 1 ledger_id 2 watermark, an entry id
OK watermark dropped-entries ]]
local function trim(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local ms, n = parse_id(args[2])
  if is_after(ms, n, meta.trim_ms, meta.trim_n) then
    redis.call('HSET', keys[1], 'trimmed_to', args[2])
  end
  local dropped = 0
  for i = 3, #keys do
    local length = redis.call('LLEN', keys[i])
    while length > 0 do
      local first = parse_entry(redis.call('LINDEX', keys[i], 0))
      if is_after(first.ms, first.n, ms, n) or (length == 1 and first.h ~= 0) then -- G6
        break
      end
      redis.call('LPOP', keys[i])
      length, dropped = length - 1, dropped + 1
    end
  end
  return { 'OK', args[2], text(dropped) }
end

--[[ stop: what the projector says of calls: that none may begin and why, that they may again, or nothing yet. It is no
event: nothing may be appended to a ledger that went back in time. Only the projector whose lease is the latest is
listened to; its lease is in another slot on a cluster, so its epoch is kept here. While the ledger lacks what the one
had folded that stopped calls, only a projector of the same data directory lets them begin again: there, a person has
set its file aside. Another one, which has seen less, does not.
KEYS meta ledger   ARGS 1 ledger_id 2 projector 3 epoch of its lease 4 its data directory 5 stop | resume | claim
     6 newest event that it has folded 7 reason (stop)
OK reason ('': calls may begin) | FENCED projector epoch | BACK ]]
local function stop(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  local m = redis.call('HMGET', keys[1], 'projector_epoch', 'projector', 'stopped_seen', 'stopped_at')
  local epoch, word = int(args[3]), args[5]
  if m[1] and (epoch < int(m[1]) or (epoch == int(m[1]) and args[2] ~= m[2])) then -- G8
    return { 'FENCED', m[2], m[1] }
  end
  local is_missing = meta.stopped and not has_event(meta, keys[2], m[3])
  if word == 'resume' then
    if is_missing and m[4] ~= args[4] then -- G8
      return { 'BACK', m[3] }
    elseif not has_event(meta, keys[2], args[6]) then -- G8
      return { 'BACK', args[6] }
    end
  end
  redis.call('HSET', keys[1], 'projector_epoch', text(epoch), 'projector', args[2])
  if word == 'resume' then
    redis.call('HDEL', keys[1], 'stopped', 'stopped_seen', 'stopped_at')
    return { 'OK', '' }
  elseif word == 'stop' and not is_missing then
    redis.call('HSET', keys[1], 'stopped', args[7], 'stopped_seen', args[6], 'stopped_at', args[4]) -- G8
    return { 'OK', args[7] }
  end
  return { 'OK', meta.stopped or '' }
end

--[[ create: give the ledger its identity, once; a ledger that has one keeps it.
KEYS meta ledger   ARGS 1 ledger_id 2 partitions
OK ledger_id partitions seq last_id trimmed_to | ORPHAN ]]
local function create(keys, args)
  if string.format('%d', EXACT - 1) ~= '9007199254740991' then
    bug('this server was built for 32 bits and cannot write amounts of money')
  end
  local has_stream = redis.call('EXISTS', keys[2]) == 1
  if redis.call('EXISTS', keys[1]) == 0 then
    if has_stream then
      return { 'ORPHAN' } -- G8
    end
    redis.call('HSET', keys[1], 'ledger_id', args[1], 'partitions', args[2], 'removed', '0', 'trimmed_to', '0-0',
      'created_ms', text(now_ms()))
  end
  local m = redis.call('HMGET', keys[1], 'ledger_id', 'partitions', 'removed', 'trimmed_to')
  local newest = has_stream and redis.call('XREVRANGE', keys[2], '+', '-', 'COUNT', 1)[1]
  return { 'OK', m[1], m[2], text(int(m[3]) + redis.call('XLEN', keys[2])), newest and newest[1] or '0-0', m[4] }
end

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
    call.amount, call.begun = call.amount + event.amount, int(event.attempt)
    return call
  end
  call = call or new_call(p.content_hash or '-', p.worker, event.user, event.period)
  call.state, call.hold, call.amount, call.worker = 'open', int(p.hold), event.amount, p.worker
  call.deadline, call.begun, call.spent, call.assumed = text(p.deadline_ms), int(event.attempt), 0, 0
  call.cap, call.plan = p.cap_nanousd or 0, p.assigned_plan or p.plan or '-'
  move_call(call, event.period, table.concat(budgets_of(event, p), '\n'))
  return call
end

APPLY['model-called'] = function(call, event, p)
  if not call or not mark(call, 'm' .. event.attempt) then
    return call
  end
  local attempt, is_of_hold = int(event.attempt), (p.hold or 0) == call.hold
  call.recorded = math.max(call.recorded, attempt)
  if event.step == 'record' and call.state == 'open' and is_of_hold then
    call.spent = call.spent + p.charge_nanousd
    call.assumed = call.assumed + (p.charge_basis == 'assumed' and p.charge_nanousd or 0)
    call.begun = math.max(call.begun, attempt + 1) -- G3
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
    call.begun = hold == '0' and 0 or math.max(call.begun, int(event.attempt))
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

-- Put back what one event moved: money in the tails, the hold, the account, the record of the call.
local function apply(meta, keys, event, ttl)
  local p, kind = event.p, event.type
  local ds = (kind == 'cost-recorded' or kind == 'cost-adjusted' or kind == 'budget-opened') and event.amount or 0
  local dh = kind == 'budget-reserved' and event.amount or kind == 'cost-recorded' and -(p.hold_nanousd or 0) or 0
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

--[[ balance: the balances and caps that a call would be compared with; changes nothing.
KEYS meta ledger account tail...   ARGS 1 ledger_id 2 period 3.. budgets with baselines
OK settled held cap, for each budget | STOPPED reason | POLICY version ]]
local function read_balance(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  if meta.stopped then -- G8
    return { 'STOPPED', meta.stopped }
  end
  refusal = other_policy(meta)
  if refusal then
    return refusal
  end
  local names, baselines = read_budgets(args, 3)
  local w
  w, refusal = weigh(meta, tails_of(keys, 4), names, baselines, keys[3], args[2], 0)
  if not w then
    return refusal
  end
  local reply = { 'OK' }
  for i, b in ipairs(w.balances) do
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = text(b.s), text(b.h), text(w.caps[i])
  end
  return reply
end

--[[ renew: reset the idle time of those entries of a task stream that this consumer still owns.
KEYS stream   ARGS 1 group 2 consumer 3.. entry ids
The entry ids that it no longer owns. ]]
local function renew(keys, args)
  local lost = {}
  for i = 3, #args do
    local pending = redis.call('XPENDING', keys[1], args[1], args[i], args[i], 1)[1]
    if pending and pending[2] == args[2] then
      redis.call('XCLAIM', keys[1], args[1], args[2], 0, args[i], 'JUSTID')
    else
      lost[#lost + 1] = args[i]
    end
  end
  return lost
end

--[[ dead_letter: append a task that cannot be executed, if one is given, and drop the oldest ones beyond the limits.
KEYS dead-letters dropped   ARGS 1 most letters 2 keep ms 3.. fields and values
id|'' number dropped by this step ]]
local function dead_letter(keys, args)
  local id = ''
  if #args > 2 then
    id = redis.call('XADD', keys[1], '*', unpack(args, 3))
  end
  local too_old = text(math.max(0, now_ms() - int(args[2])))
  local dropped = redis.call('XTRIM', keys[1], 'MAXLEN', args[1]) + redis.call('XTRIM', keys[1], 'MINID', too_old)
  if dropped > 0 then
    redis.call('INCRBY', keys[2], text(dropped))
  end
  return { id, dropped }
end

--[[ trim_tasks: drop the oldest entries of a task stream, those that every consumer group on it has read and
acknowledged. The stream is the user's: other groups' positions count as much as this one's, and in doubt nothing is
dropped. Whole nodes of the stream go at a time, so some finished entries stay.
KEYS stream   ARGS 1 the group that must be there 2 keep ms 3 most entries to drop in this step
number dropped, and the group that keeps entries older than that ('' if none does) ]]
local function trim_tasks(keys, args)
  local first = redis.call('XRANGE', keys[1], '-', '+', 'COUNT', 1)[1]
  if not first then
    return { 0, '' }
  end
  local old_ms = math.max(0, now_ms() - int(args[2]))
  local min_id, min_ms, min_n, blocker, is_known = text(old_ms) .. '-0', old_ms, 0, '', false
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', keys[1])) do
    local group = {}
    for i = 1, #flat, 2 do
      group[flat[i]] = flat[i + 1]
    end
    is_known = is_known or group.name == args[1]
    -- The newest entry that it has read may stay; the oldest that it has not acknowledged must.
    local ids = { group['last-delivered-id'] }
    if group.pending > 0 then
      ids[2] = redis.call('XPENDING', keys[1], group.name)[2]
    end
    for _, id in ipairs(ids) do
      local ms, n = parse_id(id)
      if ms >= EXACT or n >= EXACT then
        return { 0, group.name }
      end
      if is_after(min_ms, min_n, ms, n) then
        min_id, min_ms, min_n, blocker = id, ms, n, group.name
      end
    end
  end
  if not is_known then
    return { 0, '' }
  end
  local dropped = redis.call('XTRIM', keys[1], 'MINID', '~', min_id, 'LIMIT', args[3])
  local first_ms = parse_id(first[1])
  return { dropped, first_ms < old_ms and blocker or '' }
end

--[[ remove_consumer: remove a consumer of a task stream that has nothing pending; with something pending it stays,
since its pending entries would be forgotten with it.
KEYS stream   ARGS 1 group 2 consumer
1 if it was removed, else 0 ]]
local function remove_consumer(keys, args)
  if #redis.call('XPENDING', keys[1], args[1], '-', '+', 1, args[2]) > 0 then -- G3
    return 0
  end
  redis.call('XGROUP', 'DELCONSUMER', keys[1], args[1], args[2])
  return 1
end

--[[ probe: show that a hold could be written and announced now, by writing and taking back.
It may be called by whoever may call the gate; whatever refuses writes refuses this (a replica, a full memory, a disk
that cannot be written). Keys of the partition that this user may not use are refused by the call itself.
KEYS meta ledger holds waiters account call result tail probe
OK ]]
local function probe(keys)
  local key = keys[#keys]
  redis.call('XADD', key, '*', 'probe', '1')
  redis.call('DEL', key)
  return { 'OK' }
end

--[[ permissions: which of these the calling user may not do. The server only asks itself; nothing is done. A command
must be whole: of one without its arguments, the server reads keys and channels from memory that is not there.
ARGS each "command NAME ARGUMENTS", "key NAME" or "channel NAME"
Those that are refused. ]]
local function permissions(_, args)
  local refused = {}
  for _, wanted in ipairs(args) do
    local kind, name = string.match(wanted, '^(%l+) (.+)$')
    local allowed
    if kind == 'command' then
      local words = {}
      for word in string.gmatch(name, '%S+') do
        words[#words + 1] = word
      end
      allowed = redis.acl_check_cmd(unpack(words))
    elseif kind == 'key' then
      allowed = redis.acl_check_cmd('FCALL', 'any', '1', name)
    elseif kind == 'channel' then
      allowed = redis.acl_check_cmd('PUBLISH', name, 'x') or redis.acl_check_cmd('SUBSCRIBE', name)
    else
      bug('neither command, key nor channel: ' .. wanted)
    end
    if not allowed then
      refused[#refused + 1] = wanted
    end
  end
  return refused
end

redis.register_function('tollbook_v2_reserve', reserve)
redis.register_function('tollbook_v2_record', record)
redis.register_function('tollbook_v2_note', note)
redis.register_function('tollbook_v2_settle', settle)
redis.register_function('tollbook_v2_adjust', adjust)
redis.register_function('tollbook_v2_release', release)
redis.register_function('tollbook_v2_charge', charge)
redis.register_function('tollbook_v2_assign', assign)
redis.register_function('tollbook_v2_withdraw', withdraw)
redis.register_function('tollbook_v2_apply_policy', apply_policy)
redis.register_function('tollbook_v2_change_credit', change_credit)
redis.register_function('tollbook_v2_create_key', create_key)
redis.register_function('tollbook_v2_revoke_key', revoke_key)
redis.register_function('tollbook_v2_forget_alerts', forget_alerts)
redis.register_function('tollbook_v2_trim', trim)
redis.register_function('tollbook_v2_stop', stop)
redis.register_function('tollbook_v2_create', create)
redis.register_function('tollbook_v2_restore', restore)
redis.register_function('tollbook_v2_recovered', recovered)
redis.register_function({ function_name = 'tollbook_v2_balance', callback = read_balance, flags = { 'no-writes' } })
redis.register_function('tollbook_v2_renew', renew)
redis.register_function('tollbook_v2_dead_letter', dead_letter)
redis.register_function('tollbook_v2_trim_tasks', trim_tasks)
redis.register_function('tollbook_v2_remove_consumer', remove_consumer)
redis.register_function('tollbook_v2_probe', probe)
redis.register_function({ function_name = 'tollbook_v2_permissions', callback = permissions, flags = { 'no-writes' } })
