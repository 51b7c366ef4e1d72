-- A hold is held, settled and corrected with the same amount in all its budgets. In one that a policy opened meanwhile, it
-- is held by that event.
WITH listed AS (
    SELECT
        partition, seq, id, payload->'budgets'->0->>'budget' AS budget,
        unnest(from_json(payload->'holds', '[{"call_id": "VARCHAR", "hold": "INTEGER", "amount_nanousd": "BIGINT"}]')) AS held
    FROM events
    WHERE type = 'budget-opened'
),
moves AS (
    SELECT c.partition, c.call_id, c.life, c.hold, c.seq, c.id, m.budget, m.settled, m.held
    FROM verify_moves AS m
    JOIN verify_calls AS c ON c.partition = m.partition AND c.seq = m.seq
    UNION ALL
    SELECT l.partition, c.call_id, c.life, c.hold, l.seq, l.id, l.budget, 0, l.held.amount_nanousd
    FROM listed AS l
    ASOF JOIN (SELECT * FROM verify_calls WHERE kind = 'hold') AS c
        ON c.partition = l.partition AND c.call_id = l.held.call_id AND c.hold = l.held.hold AND c.seq < l.seq
)
SELECT partition, min(seq) AS seq, arg_min(id, seq) AS id, NULL AS budget,
    format('hold {} of call {} moves its budgets by different amounts', hold, call_id) AS problem
FROM (
    SELECT
        partition, call_id, life, hold, budget, min(seq) AS seq, arg_min(id, seq) AS id,
        sum(settled) AS settled, sum(held) AS held
    FROM moves
    GROUP BY partition, call_id, life, hold, budget
)
GROUP BY partition, call_id, life, hold
HAVING min(held) <> max(held) OR min(settled) <> max(settled) -- audits G1
ORDER BY partition, seq;
