--[[
Record on the ledger that a segment of it is archived. Run with EVAL.
KEYS meta ledger
ARGS 1 ledger_id 2 first seq 3 last seq 4 chain head after the segment 5 payload of segment-sealed
OK id | EXISTS sealed_seq (sealed before) | GAP sealed_seq (not the next segment) | LEDGER ledger_id
]]
local m = redis.call('HMGET', KEYS[1], 'ledger_id', 'removed', 'sealed_seq')
if m[1] ~= ARGV[1] then -- G8
  return { 'LEDGER', m[1] or '' }
end
local sealed = tonumber(m[3] or '0')
if sealed >= tonumber(ARGV[3]) then
  return { 'EXISTS', string.format('%.0f', sealed) }
end
if sealed + 1 ~= tonumber(ARGV[2]) then -- G7
  return { 'GAP', string.format('%.0f', sealed) }
end
local seq = redis.call('XLEN', KEYS[2]) + tonumber(m[2]) + 1
local id = redis.call('XADD', KEYS[2], '*', 'type', 'segment-sealed', 'v', '2', 'seq', string.format('%.0f', seq),
  'user_id', '', 'period', '', 'call_id', '', 'attempt', '0', 'amount', '0', 'committed', '', 'payload', ARGV[5])
redis.call('HSET', KEYS[1], 'sealed_seq', ARGV[3], 'sealed_chain', ARGV[4])
return { 'OK', id }
