#!lua flags=no-writes
--[[
Read the gate's entries on tails, to compare them with the events being folded. Run with EVAL; changes nothing.
KEYS meta tail...
ARGS 1 the watermark that the caller knows, ms 2 and n; then for each tail: 3 after ms 4 n 5 number of entries
OK for each tail "digest settled held": the SHA-1 of the next entries after an id, each as "id dS dH" and joined by
semicolons; and both balances after the last of them. '' if the tail has fewer entries
| TRIMMED watermark (it has moved since: entries may be gone)
]]
local function id_of(entry)
  local ms, n = string.match(entry, '^(%d+)%-(%d+) ')
  return tonumber(ms) or 0, tonumber(n) or 0 -- An entry of another program may have no id; then the digest differs.
end

local function is_after(ms, n, other_ms, other_n)
  return ms > other_ms or (ms == other_ms and n > other_n)
end

-- Index of the first entry after an id.
local function first_after(key, ms, n)
  local low, high = 0, redis.call('LLEN', key)
  while low < high do
    local middle = math.floor((low + high) / 2)
    local entry_ms, entry_n = id_of(redis.call('LINDEX', key, middle))
    if is_after(entry_ms, entry_n, ms, n) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

local watermark = redis.call('HGET', KEYS[1], 'trimmed_to') or '0-0'
local ms, n = id_of(watermark .. ' ')
if is_after(ms, n, tonumber(ARGV[1]), tonumber(ARGV[2])) then
  return { 'TRIMMED', watermark }
end
local reply = { 'OK' }
for i = 2, #KEYS do
  local at = 3 * (i - 1)
  local count = tonumber(ARGV[at + 2])
  local start = first_after(KEYS[i], tonumber(ARGV[at]), tonumber(ARGV[at + 1]))
  local entries = redis.call('LRANGE', KEYS[i], start, start + count - 1)
  local found = ''
  if #entries == count then
    local balance = string.match(entries[count], '^%S+ %S+ %S+ (%S+ %S+)$')
    for j = 1, count do
      entries[j] = string.match(entries[j], '^(%S+ %S+ %S+) ') or ''
    end
    found = redis.sha1hex(table.concat(entries, ';')) .. ' ' .. (balance or '')
  end
  reply[i] = found
end
return reply
