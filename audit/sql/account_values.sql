-- Plans, caps and credits as the events give them, in the fields and values of the gate's accounts.
WITH assigned AS (
    SELECT partition, user_id, arg_max(plan, seq) AS plan, arg_max(nanousd(cap_usd), seq)::VARCHAR AS cap_nanousd
    FROM events
    WHERE type IN ('plan-assigned', 'plan-cleared')
    GROUP BY partition, user_id
    HAVING arg_max(type, seq) = 'plan-assigned'
)
SELECT partition, user_id, 'plan' AS field, plan AS value
FROM assigned
UNION ALL
SELECT partition, user_id, 'cap_nanousd', cap_nanousd
FROM assigned
UNION ALL
SELECT partition, user_id, 'credit:' || period, sum(nanousd(amount_usd))::VARCHAR
FROM events
WHERE type IN ('credit-granted', 'credit-revoked')
GROUP BY partition, user_id, period
