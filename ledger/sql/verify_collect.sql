-- After a batch was folded: keep its moves, and what was held or refused against which cap. `batch` and `moves` are
-- the fold's own.
CREATE OR REPLACE TEMP TABLE verify_batch AS
SELECT seq, budget, cap, settled, held, recomputed
FROM moves
WHERE is_move;

INSERT INTO verify_moves
SELECT $partition, seq, budget, settled, held
FROM verify_batch;

INSERT INTO verify_reserved
SELECT b.partition, m.seq, b.id, b.user_id, b.period, m.budget, m.budget = b.account, m.cap, m.recomputed
FROM verify_batch AS m
JOIN batch AS b ON b.seq = m.seq
WHERE b.type = 'budget-reserved'
UNION ALL
SELECT partition, seq, id, user_id, period, budget, true, cap_nanousd, NULL
FROM batch
WHERE type = 'budget-denied' AND budget = account;
