-- Spend by model asked for, as the view spend_by_model books it: each attempt of a settled hold at its model, a correction
-- at the model of its attempt, what the hold cost beside its attempts at its last one. With it, what a thousand tokens
-- really cost (token_prices).
WITH chosen AS (
    FROM chosen_events($period, $plan, $user, $campaign)
),
holds AS (
    SELECT
        call_no,
        hold,
        bool_or(type = 'cost-adjusted') AS is_corrected,
        arg_max(model, seq) AS model,
        sum(CASE type WHEN 'cost-recorded' THEN amount_usd WHEN 'model-called' THEN -charge_usd ELSE 0 END) AS rest_usd,
        coalesce(sum(prompt_tokens) FILTER (outcome = 'recorded'), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens) FILTER (outcome = 'recorded'), 0) AS completion_tokens
    FROM chosen
    GROUP BY call_no, hold
    HAVING bool_or(type = 'cost-recorded')
),
-- What each attempt of a corrected hold cost; what it cost beyond its attempts comes last.
costs AS (
    SELECT
        call_no, hold, attempt,
        arg_max(model, seq) FILTER (type = 'model-called') AS model,
        sum(CASE type WHEN 'model-called' THEN charge_usd ELSE amount_usd END) AS cost_usd
    FROM chosen
    SEMI JOIN (FROM holds WHERE is_corrected) AS corrected USING (call_no, hold)
    WHERE type IN ('model-called', 'cost-adjusted')
    GROUP BY call_no, hold, attempt
    UNION ALL
    SELECT call_no, hold, 2147483647, model, rest_usd
    FROM holds
    WHERE is_corrected
),
sums AS (
    SELECT *, sum(cost_usd) OVER (PARTITION BY call_no, hold ORDER BY attempt) AS cost_so_far
    FROM costs
),
shares AS (
    SELECT
        *,
        greatest(0, min(cost_so_far) OVER (
            PARTITION BY call_no, hold ORDER BY attempt ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING
        )) AS left_usd
    FROM sums
)
SELECT
    coalesce(model, 'not named') AS model,
    sum(spent_usd)::DECIMAL(18, 9) AS spent_usd,
    sum(attempts)::BIGINT AS attempts,
    sum(prompt_tokens)::BIGINT AS prompt_tokens,
    sum(completion_tokens)::BIGINT AS completion_tokens,
    (sum(told_usd)::DOUBLE * 1000 / nullif(sum(told_tokens), 0))::DECIMAL(38, 9) AS usd_per_1000_tokens
FROM (
    SELECT
        attempt.model,
        count(*) AS attempts,
        sum(CASE WHEN h.is_corrected THEN 0 ELSE charge_usd END) AS spent_usd,
        coalesce(sum(attempt.prompt_tokens), 0) AS prompt_tokens,
        coalesce(sum(attempt.completion_tokens), 0) AS completion_tokens,
        sum(charge_usd) FILTER (attempt.prompt_tokens IS NOT NULL AND basis IN ('reported', 'priced')) AS told_usd,
        sum(attempt.prompt_tokens + attempt.completion_tokens) FILTER (basis IN ('reported', 'priced')) AS told_tokens
    FROM chosen AS attempt
    JOIN holds AS h USING (call_no, hold)
    WHERE type = 'model-called'
    GROUP BY attempt.model
    UNION ALL
    SELECT
        model, 0, sum(CASE WHEN is_corrected THEN 0 ELSE rest_usd END), sum(prompt_tokens), sum(completion_tokens), 0, 0
    FROM holds
    GROUP BY model
    UNION ALL
    SELECT coalesce(own_model, model), 0, sum(left_usd - before_usd), 0, 0, 0, 0
    FROM (
        SELECT
            c.model AS own_model, h.model, left_usd,
            coalesce(lag(left_usd) OVER (PARTITION BY call_no, hold ORDER BY attempt), 0) AS before_usd
        FROM shares AS c
        JOIN holds AS h USING (call_no, hold)
    )
    GROUP BY ALL
)
GROUP BY ALL
ORDER BY spent_usd DESC, model
