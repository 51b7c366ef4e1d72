-- Credits of budgets with window `total`.

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
