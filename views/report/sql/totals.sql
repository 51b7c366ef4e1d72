-- One row: the selection in a few numbers.
SELECT
    events.spent_usd,
    events.assumed_usd,
    events.held_usd,
    calls.calls,
    calls.users,
    events.attempts,
    events.failed,
    events.fallbacks,
    denials.denied,
    denials.denied_users,
    least(events.first_at, denials.first_at) AS first_at,
    greatest(events.last_at, denials.last_at) AS last_at
FROM (
    SELECT
        coalesce(sum(amount_usd) FILTER (type IN ('cost-recorded', 'cost-adjusted')), 0)::DECIMAL(18, 9) AS spent_usd,
        coalesce(sum(assumed_usd) FILTER (type IN ('cost-recorded', 'cost-adjusted')), 0)::DECIMAL(18, 9) AS assumed_usd,
        coalesce(sum(CASE type WHEN 'budget-reserved' THEN amount_usd WHEN 'cost-recorded' THEN -hold_usd END), 0)
            ::DECIMAL(18, 9) AS held_usd,
        count(*) FILTER (type = 'model-called') AS attempts,
        count(*) FILTER (type = 'model-called' AND outcome <> 'ok') AS failed,
        count(*) FILTER (type = 'fallback-used') AS fallbacks,
        min(recorded) AS first_at,
        max(recorded) AS last_at
    FROM chosen_events($period, $plan, $user, $campaign)
) AS events
CROSS JOIN (
    SELECT
        count(*) FILTER (is_made) AS calls,
        count(DISTINCT user_id) AS users
    FROM chosen_calls($period, $plan, $user, $campaign)
) AS calls
CROSS JOIN (
    SELECT
        count(*) AS denied,
        count(DISTINCT user_id) AS denied_users,
        min(recorded_at) AS first_at,
        max(recorded_at) AS last_at
    FROM chosen_denials($period, $plan, $user, $campaign)
) AS denials
