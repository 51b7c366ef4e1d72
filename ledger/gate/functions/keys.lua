-- The gateway's keys.

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
ARGS 1 ledger_id 2 command id 3 content hash 4 key id 5 after so many ms 6 command ttl s 7 payload 8 not before this ms
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
  local at_ms = math.max(now_ms() + math.max(0, after_ms), int(args[8]))
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
