-- Entries of tails that the events do not give, and moves after the watermark that are not on their tail. An entry is
-- "dS dH S H": what is moved, and the balance after it.
WITH moves AS (
    SELECT
        m.budget, e.id, m.seq,
        m.settled || ' ' || m.held || ' ' || sum(m.settled) OVER of_budget || ' ' || sum(m.held) OVER of_budget AS entry,
        (split_part(e.id, '-', 1)::BIGINT, split_part(e.id, '-', 2)::BIGINT) > ($ms, $n) AS must_be_there
    FROM verify_moves AS m
    JOIN events AS e ON e.partition = $partition AND e.seq = m.seq
    WHERE m.partition = $partition
    WINDOW of_budget AS (PARTITION BY m.budget ORDER BY m.seq ROWS UNBOUNDED PRECEDING)
)
SELECT budget, id, t.entry AS found, m.entry AS given
FROM gate_tails AS t
FULL JOIN moves AS m USING (budget, id)
WHERE (t.entry IS NOT NULL AND t.entry IS DISTINCT FROM m.entry) OR (t.entry IS NULL AND m.must_be_there) -- audits G6
UNION ALL
SELECT b.budget, b.last_id, NULL, nanousd(b.settled_usd) || ' ' || nanousd(b.held_usd)
FROM budgets AS b
ANTI JOIN gate_tails AS t ON t.budget = b.budget
ANTI JOIN gate_later AS l ON l.kind = 'budget' AND l.name = b.budget
WHERE b.partition = $partition AND b.held_usd <> 0 -- audits G6
    AND (split_part(b.last_id, '-', 1)::BIGINT, split_part(b.last_id, '-', 2)::BIGINT) <= ($ms, $n)
ORDER BY budget, id;
