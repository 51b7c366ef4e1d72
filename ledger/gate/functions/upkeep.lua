-- Identity, watermark and stops of a ledger.

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
      local first_ms, first_n, _, _, _, held = parse_entry(redis.call('LINDEX', keys[i], 0))
      if is_after(first_ms, first_n, ms, n) or (length == 1 and held ~= 0) then -- G6
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
