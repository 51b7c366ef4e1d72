-- The cap in force is kept without credit, since credit adds to whatever cap comes later. A stamp of the
-- gate includes the credit up to then; the cap of a plan does not.
INSERT INTO counters
WITH stamps AS (
    SELECT account, max(seq) AS seq, arg_max(cap_nanousd, seq) AS cap, arg_max(type, seq) AS type
    FROM batch
    WHERE type IN ('budget-reserved', 'plan-assigned') OR (type = 'budget-denied' AND budget = account)
    GROUP BY account
),
credits AS (
    SELECT b.account, sum(b.amount) AS before
    FROM batch AS b
    JOIN stamps AS s ON s.account = b.account AND b.seq < s.seq
    WHERE b.type = 'credit-granted'
    GROUP BY b.account
),
bases AS (
    SELECT
        s.account,
        usd(s.cap - CASE WHEN s.type = 'plan-assigned' THEN 0
            ELSE coalesce(c.before, 0) + coalesce(nanousd(k.credit_usd), 0) END) AS base_cap_usd
    FROM stamps AS s
    LEFT JOIN credits AS c ON c.account = s.account
    LEFT JOIN counters AS k ON k.budget = s.account
),
sums AS (
    SELECT
        account,
        any_value(user_id) AS user_id,
        any_value(period) AS period,
        arg_max(plan, seq) AS plan,
        usd(coalesce(sum(amount) FILTER (type = 'credit-granted'), 0)) AS credit_usd,
        count(*) FILTER (
            (type = 'budget-reserved' AND hold = 1 AND kind IS DISTINCT FROM 'extension') OR outcome = 'recorded'
        ) AS calls,
        count(*) FILTER (type = 'budget-denied') AS denied,
        count(*) FILTER (type = 'fallback-used') AS fallbacks,
        count(*) FILTER (type = 'model-called') AS attempts,
        usd(coalesce(sum(amount) FILTER (type = 'cost-adjusted'), 0)) AS adjusted_usd,
        usd(coalesce(sum(assumed_nanousd), 0)) AS assumed_usd,
        usd(coalesce(sum(overage_nanousd), 0)) AS overage_usd,
        coalesce(sum(usage.prompt_tokens) FILTER (has_tokens), 0) AS prompt_tokens,
        coalesce(sum(usage.completion_tokens) FILTER (has_tokens), 0) AS completion_tokens,
        coalesce(sum(usage.cached_tokens) FILTER (has_tokens), 0) AS cached_tokens,
        coalesce(sum(usage.reasoning_tokens) FILTER (has_tokens), 0) AS reasoning_tokens,
        min(recorded_at) AS first_at,
        max(recorded_at) AS last_at,
        max(seq) AS last_seq
    FROM (SELECT *, type = 'model-called' OR outcome = 'recorded' AS has_tokens FROM batch)
    WHERE user_id <> '' AND period <> ''
    GROUP BY account
)
SELECT
    account, user_id, period, plan, base_cap_usd, credit_usd, calls, denied, fallbacks, attempts, adjusted_usd,
    assumed_usd, overage_usd, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, first_at, last_at,
    last_seq
FROM sums
LEFT JOIN bases USING (account)
ON CONFLICT (budget) DO UPDATE SET
    plan = coalesce(excluded.plan, counters.plan),
    base_cap_usd = coalesce(excluded.base_cap_usd, counters.base_cap_usd),
    credit_usd = counters.credit_usd + excluded.credit_usd,
    calls = counters.calls + excluded.calls,
    denied = counters.denied + excluded.denied,
    fallbacks = counters.fallbacks + excluded.fallbacks,
    attempts = counters.attempts + excluded.attempts,
    adjusted_usd = counters.adjusted_usd + excluded.adjusted_usd,
    assumed_usd = counters.assumed_usd + excluded.assumed_usd,
    overage_usd = counters.overage_usd + excluded.overage_usd,
    prompt_tokens = counters.prompt_tokens + excluded.prompt_tokens,
    completion_tokens = counters.completion_tokens + excluded.completion_tokens,
    cached_tokens = counters.cached_tokens + excluded.cached_tokens,
    reasoning_tokens = counters.reasoning_tokens + excluded.reasoning_tokens,
    last_at = excluded.last_at,
    last_seq = excluded.last_seq;
