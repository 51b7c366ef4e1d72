-- A user's plan, cap and credit.

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
