-- After a batch was folded: keep its moves, and its holds and refusals with their caps. What holds nothing is within any
-- cap (G9). `moves` is a table of the fold.
INSERT INTO verify_moves
SELECT $partition, seq, budget, nanousd(settled), nanousd(held)
FROM moves
WHERE is_move;

INSERT INTO verify_reserved
SELECT e.partition, e.seq, e.id, e.user_id, e.period, e.plan, m.budget, m.budget = user_budget(e.user_id, e.period),
    nanousd(m.cap), CASE WHEN m.held > 0 THEN nanousd(m.recomputed) END
FROM moves AS m
JOIN events AS e ON e.partition = $partition AND e.seq BETWEEN $first AND $last AND e.seq = m.seq
WHERE m.is_move AND e.type = 'budget-reserved'
UNION ALL
SELECT partition, seq, id, user_id, period, plan, budget, true, nanousd(cap_usd), NULL
FROM events
WHERE partition = $partition AND seq BETWEEN $first AND $last
    AND type = 'budget-denied' AND budget = user_budget(user_id, period);
