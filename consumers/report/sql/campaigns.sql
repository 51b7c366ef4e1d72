-- The selection by campaign, the highest spend first.
SELECT
    coalesce(campaign_id, 'not named') AS campaign_id,
    count(DISTINCT call_no) AS calls,
    count(DISTINCT user_id) AS users,
    sum(amount_usd)::DECIMAL(18, 9) AS spent_usd,
    coalesce(sum(assumed_usd), 0)::DECIMAL(18, 9) AS assumed_usd
FROM chosen_events($period, $plan, $user, $campaign)
WHERE type IN ('cost-recorded', 'cost-adjusted')
GROUP BY ALL
ORDER BY spent_usd DESC, campaign_id
