-- The moves of one budget that were just folded, after the watermark.
SELECT m.seq, i.id, nanousd(m.settled) AS settled, nanousd(m.held) AS held
FROM moves AS m
JOIN incoming AS i ON i.seq = m.seq
WHERE m.is_move AND m.budget = $budget AND (i.ms, i.n) > ($ms, $n)
ORDER BY m.seq;
