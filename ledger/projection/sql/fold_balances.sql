-- What the batch adds to each budget.
CREATE OR REPLACE TEMP TABLE balances AS
SELECT m.*, e.partition, e.id AS last_id
FROM (
    SELECT budget, sum(settled) AS settled, sum(held) AS held, arg_max(cap, seq) AS cap, max(seq) AS last_seq
    FROM moves
    WHERE is_move
    GROUP BY budget
) AS m
JOIN events AS e ON e.partition = $partition AND e.seq BETWEEN $first AND $last AND e.seq = m.last_seq;
