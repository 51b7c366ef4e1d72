-- Spend by model asked for, as the view spend_by_model books it: each attempt of a settled hold at its model, what the
-- hold cost beside its attempts at its last one. With it, what a thousand tokens really cost (token_prices).
WITH chosen AS (
    FROM chosen_events($period, $plan, $user, $campaign)
),
holds AS (
    SELECT
        call_no,
        hold,
        arg_max(model, seq) AS model,
        sum(CASE WHEN type IN ('cost-recorded', 'cost-adjusted') THEN amount_usd WHEN type = 'model-called' THEN -charge_usd
            ELSE 0 END) AS rest_usd,
        coalesce(sum(prompt_tokens) FILTER (outcome = 'recorded'), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens) FILTER (outcome = 'recorded'), 0) AS completion_tokens
    FROM chosen
    GROUP BY call_no, hold
    HAVING bool_or(type = 'cost-recorded')
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
        model,
        count(*) AS attempts,
        sum(charge_usd) AS spent_usd,
        coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens), 0) AS completion_tokens,
        sum(charge_usd) FILTER (prompt_tokens IS NOT NULL AND basis IN ('reported', 'priced')) AS told_usd,
        sum(prompt_tokens + completion_tokens) FILTER (basis IN ('reported', 'priced')) AS told_tokens
    FROM chosen
    SEMI JOIN holds USING (call_no, hold)
    WHERE type = 'model-called'
    GROUP BY model
    UNION ALL
    SELECT model, 0, sum(rest_usd), sum(prompt_tokens), sum(completion_tokens), 0, 0
    FROM holds
    GROUP BY model
)
GROUP BY ALL
ORDER BY spent_usd DESC, model
