-- What can be chosen. Asked of the projection itself, so that it can be known before anything is prepared.
WITH orders AS (
    -- Money spent elsewhere may name neither.
    SELECT DISTINCT plan, campaign_id FROM events
    WHERE type IN ('budget-reserved', 'budget-denied') OR (type = 'cost-recorded' AND outcome = 'recorded')
)
SELECT 'period' AS kind, period AS value FROM spend
UNION
SELECT 'user', user_id FROM spend
UNION
SELECT 'plan', coalesce(plan, 'not named') FROM orders
UNION
SELECT 'campaign', coalesce(campaign_id, 'not named') FROM orders
ORDER BY ALL
