-- Settled spend and corrections by plan, in buckets of $step_s seconds; weeks begin on Mondays.
SELECT
    time_bucket(to_seconds($step_s), recorded, TIMESTAMP '2001-01-01') AS from_at,
    from_at + to_seconds($step_s) AS to_at,
    coalesce(plan, 'not named') AS plan,
    count(DISTINCT call_no) AS calls,
    sum(amount_usd)::DECIMAL(18, 9) AS spent_usd
FROM chosen_events($period, $plan, $user, $campaign)
WHERE type IN ('cost-recorded', 'cost-adjusted')
GROUP BY ALL
ORDER BY from_at, plan
