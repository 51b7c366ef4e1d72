-- The selection by campaign, the highest spend first.
SELECT
    coalesce(campaign_id, 'not named') AS campaign_id,
    sum(calls)::BIGINT AS calls,
    sum(users)::BIGINT AS users,
    coalesce(sum(spent_usd), 0)::DECIMAL(18, 9) AS spent_usd,
    coalesce(sum(assumed_usd), 0)::DECIMAL(18, 9) AS assumed_usd
FROM (
    SELECT campaign_id, count(*) AS calls, count(DISTINCT user_id) AS users
    FROM chosen_calls($period, $plan, $user, $campaign)
    WHERE is_made
    GROUP BY campaign_id
    UNION ALL BY NAME
    SELECT campaign_id, sum(amount_usd) AS spent_usd, sum(assumed_usd) AS assumed_usd
    FROM chosen_events($period, $plan, $user, $campaign)
    WHERE type IN ('cost-recorded', 'cost-adjusted')
    GROUP BY campaign_id
)
GROUP BY ALL
ORDER BY spent_usd DESC, campaign_id
