-- The record of a call.

-- One pattern for the whole record: string work is most of what a step costs. Of the parts of the first line, the user's
-- id alone may have spaces. It is matched shortest first: longest first, it takes the rest of the line and gives that
-- back by trials. Numbers stay text, which costs less to write again, until a step computes with one.
local CALL_HEAD = '^(%S+) (%S+) (%d+) (%d+) (%S+) (%d+) ([^\n]-) (%S+) (%d+) (%d+) (%d+) (%d+)'
local CALL_LINES = '\n([^\n]*)\n([^\n]*)\n([^\n]*)\n(.*)$'
local CALL_PATTERN = CALL_HEAD .. ' (%d+) (%S+)' .. CALL_LINES
local OLD_CALL_PATTERN = CALL_HEAD .. CALL_LINES

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
  return { state = state, hash = hash, hold = hold, amount = amount, worker = worker, deadline = deadline, user = user,
    period = period, recorded = recorded, begun = begun, spent = spent, assumed = assumed, cap = cap, plan = plan,
    settled = settled, marks = marks, denial = denial, budgets = budgets }
end

local function new_call(hash, worker, user, period)
  return { hash = hash, hold = '0', amount = '0', worker = worker, deadline = '0', user = user, period = period,
    recorded = '0', begun = '0', spent = '0', assumed = '0', cap = '0', plan = '-', settled = '', marks = ' ',
    denial = '', budgets = '' }
end

local function write_call(key, c, ttl)
  local value = c.state .. ' ' .. c.hash .. ' ' .. c.hold .. ' ' .. c.amount .. ' ' .. c.worker .. ' ' .. c.deadline ..
    ' ' .. c.user .. ' ' .. c.period .. ' ' .. c.recorded .. ' ' .. c.begun .. ' ' .. c.spent .. ' ' .. c.assumed ..
    ' ' .. c.cap .. ' ' .. c.plan .. '\n' .. c.settled .. '\n' .. c.marks .. '\n' .. c.denial .. '\n' .. c.budgets
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
        call.recorded = text(math.max(exact(call.recorded), int(event.attempt)))
      end
    end
  end
end
