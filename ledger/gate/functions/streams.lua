-- Task streams: what consumers, publishers and their keepers need in one step.

--[[ renew: reset the idle time of those entries of a task stream that this consumer still owns.
KEYS stream   ARGS 1 group 2 consumer 3.. entry ids
The entry ids that it no longer owns. ]]
local function renew(keys, args)
  local lost = {}
  for i = 3, #args do
    local pending = redis.call('XPENDING', keys[1], args[1], args[i], args[i], 1)[1]
    if pending and pending[2] == args[2] then
      redis.call('XCLAIM', keys[1], args[1], args[2], 0, args[i], 'JUSTID')
    else
      lost[#lost + 1] = args[i]
    end
  end
  return lost
end

--[[ dead_letter: append a task that cannot be executed, if one is given, and drop the oldest ones beyond the limits.
KEYS dead-letters dropped   ARGS 1 most letters 2 keep ms 3.. fields and values
id|'' number dropped by this step ]]
local function dead_letter(keys, args)
  local id = ''
  if #args > 2 then
    id = redis.call('XADD', keys[1], '*', unpack(args, 3))
  end
  local too_old = text(math.max(0, now_ms() - int(args[2])))
  local dropped = redis.call('XTRIM', keys[1], 'MAXLEN', args[1]) + redis.call('XTRIM', keys[1], 'MINID', too_old)
  if dropped > 0 then
    redis.call('INCRBY', keys[2], text(dropped))
  end
  return { id, dropped }
end

--[[ trim_tasks: drop the oldest entries of a task stream, those that every consumer group on it has read and
acknowledged. The stream is the user's: other groups' positions count as much as this one's, and in doubt nothing is
dropped. Whole nodes of the stream go at a time, so some finished entries stay.
KEYS stream   ARGS 1 the group that must be there 2 keep ms 3 most entries to drop in this step
number dropped, and the group that keeps entries older than that ('' if none does) ]]
local function trim_tasks(keys, args)
  local first = redis.call('XRANGE', keys[1], '-', '+', 'COUNT', 1)[1]
  if not first then
    return { 0, '' }
  end
  local old_ms = math.max(0, now_ms() - int(args[2]))
  local min_id, min_ms, min_n, blocker, is_known = text(old_ms) .. '-0', old_ms, 0, '', false
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', keys[1])) do
    local group = {}
    for i = 1, #flat, 2 do
      group[flat[i]] = flat[i + 1]
    end
    is_known = is_known or group.name == args[1]
    -- The newest entry that it has read may stay; the oldest that it has not acknowledged must.
    local ids = { group['last-delivered-id'] }
    if group.pending > 0 then
      ids[2] = redis.call('XPENDING', keys[1], group.name)[2]
    end
    for _, id in ipairs(ids) do
      local ms, n = parse_id(id)
      if ms >= EXACT or n >= EXACT then
        return { 0, group.name }
      end
      if is_after(min_ms, min_n, ms, n) then
        min_id, min_ms, min_n, blocker = id, ms, n, group.name
      end
    end
  end
  if not is_known then
    return { 0, '' }
  end
  local dropped = redis.call('XTRIM', keys[1], 'MINID', '~', min_id, 'LIMIT', args[3])
  local first_ms = parse_id(first[1])
  return { dropped, first_ms < old_ms and blocker or '' }
end

--[[ remove_consumer: remove a consumer of a task stream that has nothing pending; with something pending it stays,
since its pending entries would be forgotten with it.
KEYS stream   ARGS 1 group 2 consumer
1 if it was removed, else 0 ]]
local function remove_consumer(keys, args)
  if #redis.call('XPENDING', keys[1], args[1], '-', '+', 1, args[2]) > 0 then -- G3
    return 0
  end
  redis.call('XGROUP', 'DELCONSUMER', keys[1], args[1], args[2])
  return 1
end
