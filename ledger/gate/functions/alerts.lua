-- Which alerts a step raises.

-- Fractions of a cap as the policy writes them, such as "0.8", with their ten-thousandths.
local function read_fractions(texts)
  local fractions = {}
  for _, fraction in ipairs(texts or {}) do
    fractions[#fractions + 1] = { text = fraction, parts = math.floor(tonumber(fraction) * 10000 + 0.5) }
  end
  return #fractions > 0 and fractions or nil
end

-- Dollars as the policy writes them, such as "20.5", in nano-dollars.
local function nanousd(dollars)
  local whole, rest = string.match(dollars, '^(%d+)%.?(%d*)$')
  return int(whole) * 1000000000 + int(string.sub(rest .. '000000000', 1, 9))
end

-- The alerts of the policy in force, by the key of its ledger's meta: read from there when the version has changed.
local alert_rules = {}

-- By budget, its caps and fractions; by plan, the fractions of its users' own budgets. Nil where there are none.
local function make_alert_rules(payload)
  local content, rules, has_any = payload.content or {}, { budgets = {}, plans = {} }, false
  for _, budget in ipairs(content.budgets or {}) do
    local since = (payload.definitions or {})[budget.name] or 1
    local fractions = read_fractions(budget.alerts)
    if fractions then
      local caps = {}
      for value, cap in pairs(budget.caps or {}) do
        caps[value] = nanousd(cap)
      end
      rules.budgets[since > 1 and budget.name .. '~' .. since or budget.name] =
        { fractions = fractions, cap = nanousd(budget.cap_usd), caps = caps }
      has_any = true
    end
  end
  for name, plan in pairs(content.plans or {}) do
    rules.plans[name] = read_fractions(plan.alerts)
    has_any = has_any or rules.plans[name] ~= nil
  end
  return has_any and rules or nil
end

-- The rules of the policy in force. A policy that somebody has broken by hand raises no alert: what was spent is booked
-- all the same, and the projector stops calls.
local function read_alert_rules(meta)
  local kept = alert_rules[meta.key]
  if kept and kept.version == meta.policy and kept.ledger_id == meta.ledger_id then
    return kept.rules
  end
  local rules
  if meta.policy ~= '0' then
    local policy = redis.call('HGET', meta.key, 'policy')
    local is_whole, found = pcall(function() return make_alert_rules(cjson.decode(policy)) end)
    rules = is_whole and found or nil -- G3
  end
  alert_rules[meta.key] = { version = meta.policy, ledger_id = meta.ledger_id, rules = rules }
  return rules
end

-- Alerts of a budget that settled spend has reached, and of a refusal those of its whole cap, but for those raised
-- before: each once for a budget, its window included. To be appended by `append_alerts`, after the event that moved
-- money, since a step reads first.
local function add_alerts(due, meta, name, fractions, cap, settled, is_refusal)
  local reached = {}
  for _, fraction in ipairs(fractions) do
    local threshold = math.floor(cap / 10000) * fraction.parts + math.ceil(cap % 10000 * fraction.parts / 10000)
    if (cap > 0 and settled >= threshold) or (is_refusal and fraction.parts == 10000) then
      reached[#reached + 1] = name .. ' ' .. fraction.text
    end
  end
  if #reached == 0 then
    return
  end
  local raised = redis.call('HMGET', beside(meta, 'alerts'), unpack(reached))
  for i, field in ipairs(reached) do
    if not raised[i] then
      due[#due + 1] = { field = field, budget = name, fraction = string.match(field, ' (%S+)$'), cap = cap,
        settled = settled }
    end
  end
end

local NONE = {}

-- The plan in force, where the policy has alerts that need it, else '-': the ledger's, or the one that the payload names.
local function plan_for_alerts(meta, assigned, payload)
  if not read_alert_rules(meta) then
    return '-'
  end
  return assigned ~= '' and assigned or string.match(payload, '"plan":"([^"]*)"') or '-'
end

-- The alerts that are due once `delta` is added to settled spend. `cap` and `plan` are of the user's own budget, which
-- is the first one; without a plan it is left out.
local function due_alerts(meta, names, balances, delta, cap, plan)
  local rules = read_alert_rules(meta)
  if not rules then
    return NONE
  end
  local due = {}
  for i, name in ipairs(names) do
    if i == 1 then
      if rules.plans[plan] then
        add_alerts(due, meta, name, rules.plans[plan], cap, balances[i].s + delta)
      end
    else
      local budget, value = string.match(name, '^([^:]*):(.*):[^:]*$')
      local rule = rules.budgets[budget]
      if rule then
        local own_cap = math.min((rule.caps[value] or rule.cap) + credit_of(meta, name), MAX_AMOUNT)
        add_alerts(due, meta, name, rule.fractions, own_cap, balances[i].s + delta)
      end
    end
  end
  return due
end

-- The alert of a refusal: the first one at a budget's cap, whatever is settled.
local function due_refusal_alerts(meta, names, w, refused, plan)
  local rules, due = read_alert_rules(meta), {}
  if rules then
    local rule = rules.budgets[string.match(names[refused], '^([^:]*):')]
    local fractions = refused == 1 and rules.plans[plan] or refused > 1 and rule and rule.fractions
    if fractions then
      add_alerts(due, meta, names[refused], fractions, w.caps[refused], w.balances[refused].s, true)
    end
  end
  return due
end

local function append_alerts(meta, ledger, due, call_id)
  for _, alert in ipairs(due) do
    local id = append(meta, ledger, 'alert-raised', '', '', '', '0', 0, '', '{"kind":"budget","budget":' ..
      cjson.encode(alert.budget) .. ',"window":' .. cjson.encode(string.match(alert.budget, '[^:]*$')) ..
      ',"fraction":"' .. alert.fraction .. '","cap_nanousd":' .. text(alert.cap) .. ',"settled_nanousd":' ..
      text(alert.settled) .. ',"cause":' .. cjson.encode(call_id) .. '}')
    redis.call('HSET', beside(meta, 'alerts'), alert.field, id)
  end
end
