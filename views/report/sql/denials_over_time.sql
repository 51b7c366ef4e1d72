-- Refused calls by reason, in buckets of $step_s seconds.
SELECT
    time_bucket(to_seconds($step_s), recorded_at, TIMESTAMP '2001-01-01') AS from_at,
    from_at + to_seconds($step_s) AS to_at,
    reason,
    count(*) AS denied
FROM chosen_denials($period, $plan, $user, $campaign)
GROUP BY ALL
ORDER BY from_at, reason
