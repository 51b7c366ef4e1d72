-- What can be chosen, in the order in which it is offered.
SELECT kind, value
FROM (
    SELECT DISTINCT 'period' AS kind, period AS value FROM report_calls
    UNION ALL
    SELECT DISTINCT 'plan', coalesce(plan, 'not named') FROM report_calls
    UNION ALL
    SELECT DISTINCT 'campaign', coalesce(campaign_id, 'not named') FROM report_calls
    UNION ALL
    SELECT DISTINCT 'user', user_id FROM report_calls
)
ORDER BY kind, value = 'not named', value
