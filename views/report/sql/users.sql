-- The selection by user, the highest spend first.
SELECT
    user_id,
    coalesce(any_value(spent_usd), 0)::DECIMAL(18, 9) AS spent_usd,
    coalesce(any_value(assumed_usd), 0)::DECIMAL(18, 9) AS assumed_usd,
    coalesce(any_value(calls), 0) AS calls,
    coalesce(any_value(attempts), 0) AS attempts,
    coalesce(any_value(fallbacks), 0) AS fallbacks,
    coalesce(any_value(denied), 0) AS denied
FROM (
    SELECT
        user_id,
        sum(amount_usd) FILTER (type IN ('cost-recorded', 'cost-adjusted')) AS spent_usd,
        sum(assumed_usd) FILTER (type IN ('cost-recorded', 'cost-adjusted')) AS assumed_usd,
        NULL AS calls,
        count(*) FILTER (type = 'model-called') AS attempts,
        count(*) FILTER (type = 'fallback-used') AS fallbacks,
        NULL AS denied
    FROM chosen_events($period, $plan, $user, $campaign)
    GROUP BY user_id
    UNION ALL BY NAME
    SELECT user_id, count(*) FILTER (is_made) AS calls
    FROM chosen_calls($period, $plan, $user, $campaign)
    GROUP BY user_id
    UNION ALL BY NAME
    SELECT user_id, count(*) AS denied
    FROM chosen_denials($period, $plan, $user, $campaign)
    GROUP BY user_id
)
GROUP BY user_id
ORDER BY spent_usd DESC, user_id
