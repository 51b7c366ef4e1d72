-- The newest refused calls.
SELECT
    recorded_at, user_id, plan, campaign_id, task_type, call_id, reason, budget, asked_usd, settled_usd, held_usd, cap_usd,
    short_usd
FROM chosen_denials($period, $plan, $user, $campaign)
ORDER BY recorded_at DESC, partition, seq DESC
LIMIT $rows
