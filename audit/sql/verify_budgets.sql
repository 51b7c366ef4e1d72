-- A hold is held, settled and corrected with the same amount in all its budgets.
SELECT partition, min(seq) AS seq, arg_min(id, seq) AS id, NULL AS budget,
    format('hold {} of call {} moves its budgets by different amounts', hold, call_id) AS problem
FROM (
    SELECT
        c.partition, c.call_id, c.life, c.hold, m.budget, min(c.seq) AS seq, arg_min(c.id, c.seq) AS id,
        sum(m.settled) AS settled, sum(m.held) AS held
    FROM verify_moves AS m
    JOIN verify_calls AS c ON c.partition = m.partition AND c.seq = m.seq
    GROUP BY c.partition, c.call_id, c.life, c.hold, m.budget
)
GROUP BY partition, call_id, life, hold
HAVING min(held) <> max(held) OR min(settled) <> max(settled) -- audits G1
ORDER BY partition, seq;
