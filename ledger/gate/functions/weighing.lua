-- Whether a call fits its budgets.

-- An announcement is a favour to those who wait; they also look by themselves. A user who may not use the channel
-- must not make an error of a step that has booked money.
local function announce(channel, message)
  redis.pcall('PUBLISH', channel, message) -- G3
end

local function wake(waiters, names)
  for _, name in ipairs(names) do
    if redis.call('HDEL', waiters, name) == 1 then
      announce(waiters, name)
    end
  end
end

-- The cap in force for the user's period, and the assigned plan or '': the cap is the one that the ledger assigned,
-- or else the caller's, with credit on top.
local function cap_in_force(account, period, cap)
  local a = redis.call('HMGET', account, 'cap_nanousd', 'credit:' .. period, 'plan')
  return math.min(int(a[1] or cap) + int(a[2] or 0), MAX_AMOUNT), a[3] or ''
end

-- The plan in the caller's payload is the one that the task names; the assigned one is stamped beside it.
local function stamp_plan(stamps, plan)
  if plan ~= '' then
    stamps[#stamps + 1] = '"assigned_plan":' .. cjson.encode(plan)
  end
end

-- What the id of a call or command is bound to: a recovered ledger must still tell a repeat from other content.
local function stamp_hash(stamps, hash)
  stamps[#stamps + 1] = '"content_hash":' .. cjson.encode(hash)
end

-- The name of a key of the same partition that stands beside meta.
local function beside(meta, name)
  return string.sub(meta.key, 1, -5) .. name
end

-- The credit of a budget whose balance never begins anew; others have none.
local function credit_of(meta, name)
  if string.sub(name, -6) ~= ':total' then
    return 0
  end
  return int(redis.call('HGET', beside(meta, 'credits'), name) or 0)
end

-- Compare every budget's balance and `amount` with its cap. A budget of which settled spend alone leaves no room
-- denies the call; one in which only open holds are in the way makes it wait.
local function weigh(meta, tails, names, baselines, account, period, amount)
  local balances, caps, plan, denied, waiting = {}, {}, '', nil, nil
  for i, name in ipairs(names) do
    local b, refusal = balance(meta, tails[i], name, baselines[i])
    if not b then
      return nil, refusal
    end
    local cap = baselines[i].cap
    if i == 1 then
      cap, plan = cap_in_force(account, period, cap)
    else
      cap = math.min(cap + credit_of(meta, name), MAX_AMOUNT)
    end
    balances[i], caps[i] = b, cap
    if amount > 0 and b.s + amount > cap then -- G1 G9
      denied = denied or i
    elseif amount > 0 and b.s + b.h + amount > cap then -- G1 G9
      waiting = waiting or i
    end
  end
  return { balances = balances, caps = caps, plan = plan, denied = denied, waiting = waiting }
end

local function verdict(code, names, w, i)
  local b = w.balances[i]
  return { code, names[i], text(b.s), text(b.h), text(w.caps[i]) }
end
