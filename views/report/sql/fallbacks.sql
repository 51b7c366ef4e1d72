-- From which model to which, and why.
SELECT
    from_model AS model,
    model AS to_model,
    reason,
    http_status,
    count(*) AS fallbacks
FROM chosen_events($period, $plan, $user, $campaign)
WHERE type = 'fallback-used'
GROUP BY ALL
ORDER BY fallbacks DESC, from_model, to_model, reason, http_status
