--[[
Take or renew the projector's lease. Run with EVAL; the value of the key is "owner<newline>place<newline>epoch".
The epoch is the time at which this owner took the lease, so a later owner's epoch is higher, also after a restore of
Redis; if the clock was put back, the owner asks for a higher epoch.
KEYS lease
ARGS 1 owner 2 place 3 ttl ms 4 1: no other owner can be alive at this place, 0: perhaps
     5 the lowest epoch (0: any)
OK epoch | HELD owner place remaining-ms
]]
local held = redis.call('GET', KEYS[1])
local t = redis.call('TIME')
local epoch = tonumber(t[1]) * 1000000 + tonumber(t[2])
if held then
  local owner, place, since = string.match(held, '^(.-)\n(.*)\n(%d+)$')
  if owner == ARGV[1] then
    epoch = tonumber(since)
  elseif ARGV[4] ~= '1' or place ~= ARGV[2] then
    return { 'HELD', owner, place, redis.call('PTTL', KEYS[1]) }
  end
end
local text = string.format('%.0f', math.max(epoch, tonumber(ARGV[5])))
redis.call('SET', KEYS[1], ARGV[1] .. '\n' .. ARGV[2] .. '\n' .. text, 'PX', tonumber(ARGV[3]))
return { 'OK', text }
