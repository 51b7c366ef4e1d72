-- In two steps, since DuckDB (1.5, November 2026) updates rows one by one if they do not come in the table's order,
-- and from ON CONFLICT they do not.
UPDATE counters AS k SET
    plan = coalesce(c.plan, k.plan),
    base_cap_usd = coalesce(c.base_cap_usd, k.base_cap_usd),
    credit_usd = k.credit_usd + c.credit_usd,
    calls = k.calls + c.calls,
    denied = k.denied + c.denied,
    fallbacks = k.fallbacks + c.fallbacks,
    attempts = k.attempts + c.attempts,
    adjusted_usd = k.adjusted_usd + c.adjusted_usd,
    assumed_usd = k.assumed_usd + c.assumed_usd,
    overage_usd = k.overage_usd + c.overage_usd,
    prompt_tokens = k.prompt_tokens + c.prompt_tokens,
    completion_tokens = k.completion_tokens + c.completion_tokens,
    cached_tokens = k.cached_tokens + c.cached_tokens,
    cache_write_tokens = k.cache_write_tokens + c.cache_write_tokens,
    reasoning_tokens = k.reasoning_tokens + c.reasoning_tokens,
    last_at = c.last_at,
    last_seq = c.last_seq
FROM counts AS c
WHERE k.budget = c.budget;

INSERT INTO counters BY NAME
FROM counts
ANTI JOIN counters USING (budget);
