-- Users against their caps, the fullest first.
SELECT user_id, period, plan, spent_usd, reserved_usd, cap_usd, left_usd, used_percent, mean_day_usd, runs_out_on
FROM chosen_cap_use($period, $plan, $user, $campaign)
ORDER BY used_percent DESC NULLS LAST, spent_usd DESC, user_id, period
