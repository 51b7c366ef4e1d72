--[[
Trim archived events off the stream: only sealed events, and only up to an entry with a known number.
Run with EVAL.
KEYS meta ledger   ARGS 1 ledger_id 2 sequence number of the last event to trim 3 its entry id
OK removed (events trimmed in all) | UNSEALED sealed_seq | UNKNOWN (the entry has another number) | LEDGER ledger_id
]]
local m = redis.call('HMGET', KEYS[1], 'ledger_id', 'removed', 'sealed_seq')
if m[1] ~= ARGV[1] then -- G8
  return { 'LEDGER', m[1] or '' }
end
if tonumber(m[3] or '0') < tonumber(ARGV[2]) then -- G7
  return { 'UNSEALED', m[3] or '0' }
end
local removed = tonumber(m[2])
if removed >= tonumber(ARGV[2]) then
  return { 'OK', m[2] }
end
local entry = redis.call('XRANGE', KEYS[2], ARGV[3], ARGV[3])[1]
if not entry or entry[2][6] ~= ARGV[2] then -- G7
  return { 'UNKNOWN' }
end
local ms, n = string.match(ARGV[3], '^(%d+)%-(%d+)$')
removed = removed + redis.call('XTRIM', KEYS[2], 'MINID', '=', string.format('%s-%.0f', ms, tonumber(n) + 1))
redis.call('HSET', KEYS[1], 'removed', string.format('%.0f', removed), 'removed_to', ARGV[3])
return { 'OK', string.format('%.0f', removed) }
