--[[
Take or renew the projector's lease. Run with EVAL; the value of the key is "owner<newline>place".
KEYS lease
ARGS 1 owner 2 place 3 ttl ms 4 1: whoever had the lease at this place is dead, 0: perhaps not
OK | HELD owner place remaining-ms
]]
local held = redis.call('GET', KEYS[1])
if held then
  local owner, place = string.match(held, '^(.-)\n(.*)$')
  if owner ~= ARGV[1] and not (ARGV[4] == '1' and place == ARGV[2]) then
    return { 'HELD', owner, place, redis.call('PTTL', KEYS[1]) }
  end
end
redis.call('SET', KEYS[1], ARGV[1] .. '\n' .. ARGV[2], 'PX', tonumber(ARGV[3]))
return { 'OK' }
