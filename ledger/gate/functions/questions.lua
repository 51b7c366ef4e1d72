-- What changes nothing: balances, the probe, permissions.

--[[ balance: the balances and caps that a call would be compared with; changes nothing.
KEYS meta ledger account tail...   ARGS 1 ledger_id 2 period 3.. budgets with baselines
OK settled held cap, for each budget | STOPPED reason | POLICY version ]]
local function read_balance(keys, args)
  local meta, refusal = read_meta(keys[1], keys[2], args[1])
  if not meta then
    return refusal
  end
  if meta.stopped then -- G8
    return { 'STOPPED', meta.stopped }
  end
  refusal = other_policy(meta)
  if refusal then
    return refusal
  end
  local names, baselines = read_budgets(args, 3)
  local w
  w, refusal = weigh(meta, tails_of(keys, 4), names, baselines, keys[3], args[2], 0)
  if not w then
    return refusal
  end
  local reply = { 'OK' }
  for i, b in ipairs(w.balances) do
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = text(b.s), text(b.h), text(w.caps[i])
  end
  return reply
end

--[[ probe: show that a hold could be written and announced now, by writing and taking back.
It may be called by whoever may call the gate; whatever refuses writes refuses this (a replica, a full memory, a disk
that cannot be written). Keys of the partition that this user may not use are refused by the call itself.
KEYS meta ledger holds waiters account call result tail probe
OK ]]
local function probe(keys)
  local key = keys[#keys]
  redis.call('XADD', key, '*', 'probe', '1')
  redis.call('DEL', key)
  return { 'OK' }
end

--[[ permissions: which of these the calling user may not do. The server only asks itself; nothing is done. A command
must be whole: of one without its arguments, the server reads keys and channels from memory that is not there.
ARGS each "command NAME ARGUMENTS", "key NAME" or "channel NAME"
Those that are refused. ]]
local function permissions(_, args)
  local refused = {}
  for _, wanted in ipairs(args) do
    local kind, name = string.match(wanted, '^(%l+) (.+)$')
    local allowed
    if kind == 'command' then
      local words = {}
      for word in string.gmatch(name, '%S+') do
        words[#words + 1] = word
      end
      allowed = redis.acl_check_cmd(unpack(words))
    elseif kind == 'key' then
      allowed = redis.acl_check_cmd('FCALL', 'any', '1', name)
    elseif kind == 'channel' then
      allowed = redis.acl_check_cmd('PUBLISH', name, 'x') or redis.acl_check_cmd('SUBSCRIBE', name)
    else
      bug('neither command, key nor channel: ' .. wanted)
    end
    if not allowed then
      refused[#refused + 1] = wanted
    end
  end
  return refused
end
