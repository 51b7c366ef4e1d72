-- What the batch adds to each user's counters of a period; `before` is what they were before it.
-- The cap is kept without credit, since credit is added to whatever cap comes later. The cap that the gate stamps
-- includes the credit up to then; the cap of an assigned plan does not.
CREATE OR REPLACE TEMP TABLE ${counts} AS
WITH counted AS (
    SELECT
        *,
        type IN ('budget-reserved', 'plan-assigned')
            OR (type = 'budget-denied' AND budget = user_budget(user_id, period)) AS is_stamp,
        type = 'model-called' OR coalesce(outcome = 'recorded', false) AS has_tokens
    FROM events
    WHERE partition = $partition AND seq BETWEEN $first AND $last AND user_id <> '' AND period <> ''
),
sums AS (
    SELECT
        user_id,
        period,
        arg_max(plan, seq) AS plan,
        max(seq) FILTER (is_stamp) AS stamp_seq,
        arg_max(cap_usd, seq) FILTER (is_stamp) AS cap_usd,
        arg_max(type, seq) FILTER (is_stamp) AS stamp_type,
        coalesce(sum(amount_usd) FILTER (type IN ('credit-granted', 'credit-revoked')), 0) AS credit_usd,
        count(*) FILTER (
            (type = 'budget-reserved' AND hold = 1 AND kind <> 'extension') OR outcome = 'recorded'
        ) AS calls,
        count(*) FILTER (type = 'budget-denied') AS denied,
        count(*) FILTER (type = 'fallback-used') AS fallbacks,
        count(*) FILTER (type = 'model-called') AS attempts,
        coalesce(sum(amount_usd) FILTER (type = 'cost-adjusted'), 0) AS adjusted_usd,
        coalesce(sum(assumed_usd), 0) AS assumed_usd,
        coalesce(sum(overage_usd), 0) AS overage_usd,
        coalesce(sum(prompt_tokens) FILTER (has_tokens), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens) FILTER (has_tokens), 0) AS completion_tokens,
        coalesce(sum(cached_tokens) FILTER (has_tokens), 0) AS cached_tokens,
        coalesce(sum(cache_write_tokens) FILTER (has_tokens), 0) AS cache_write_tokens,
        coalesce(sum(reasoning_tokens) FILTER (has_tokens), 0) AS reasoning_tokens,
        min(recorded_at) AS first_at,
        max(recorded_at) AS last_at,
        max(seq) AS last_seq
    FROM counted
    GROUP BY user_id, period
),
credits AS (
    SELECT c.user_id, c.period, sum(c.amount_usd) AS before_usd
    FROM counted AS c
    JOIN sums AS s ON s.user_id = c.user_id AND s.period = c.period AND c.seq < s.stamp_seq
    WHERE c.type IN ('credit-granted', 'credit-revoked')
    GROUP BY c.user_id, c.period
)
SELECT
    user_budget(s.user_id, s.period) AS budget, s.user_id, s.period, s.plan,
    s.cap_usd - CASE WHEN s.stamp_type = 'plan-assigned' THEN 0
        ELSE coalesce(c.before_usd, 0) + coalesce(k.credit_usd, 0) END AS base_cap_usd,
    s.credit_usd, s.calls, s.denied, s.fallbacks, s.attempts, s.adjusted_usd, s.assumed_usd, s.overage_usd,
    s.prompt_tokens, s.completion_tokens, s.cached_tokens, s.cache_write_tokens, s.reasoning_tokens,
    s.first_at, s.last_at, s.last_seq
FROM sums AS s
LEFT JOIN credits AS c ON c.user_id = s.user_id AND c.period = s.period
LEFT JOIN ${before} AS k ON k.budget = user_budget(s.user_id, s.period);
