-- Plans, caps and credits, those of budgets too, that Redis holds and the events do not give, or the other way; each with both values.
WITH assigned AS (
    SELECT user_id, arg_max(plan, seq) AS plan, arg_max(nanousd(cap_usd), seq)::VARCHAR AS cap_nanousd
    FROM events
    WHERE type IN ('plan-assigned', 'plan-cleared') AND partition = $partition
    GROUP BY user_id
    HAVING arg_max(type, seq) = 'plan-assigned'
),
given AS (
    SELECT user_id, 'plan' AS field, plan AS value
    FROM assigned
    UNION ALL
    SELECT user_id, 'cap_nanousd', cap_nanousd
    FROM assigned
    UNION ALL
    SELECT user_id, 'credit:' || period, sum(nanousd(amount_usd))::VARCHAR
    FROM events
    WHERE type IN ('credit-granted', 'credit-revoked') AND partition = $partition AND budget IS NULL
    GROUP BY user_id, period
    UNION ALL
    SELECT '', budget, sum(nanousd(amount_usd))::VARCHAR
    FROM events
    WHERE type IN ('credit-granted', 'credit-revoked', 'credit-expired') AND partition = $partition AND budget IS NOT NULL
    GROUP BY budget
)
SELECT user_id, field, r.value AS found, g.value AS given
FROM gate_accounts AS r
FULL JOIN given AS g USING (user_id, field)
ANTI JOIN gate_later AS l ON l.kind = 'user' AND l.name = user_id
WHERE r.value IS DISTINCT FROM g.value -- audits G1
ORDER BY user_id, field;
