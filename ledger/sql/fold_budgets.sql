INSERT INTO budgets
SELECT
    m.budget,
    $partition,
    split_part(m.budget, ':', 1),
    array_to_string(string_split(m.budget, ':')[2:-2], ':'),
    split_part(m.budget, ':', -1),
    usd(m.settled),
    usd(m.held),
    usd(m.cap),
    b.id,
    m.last_seq
FROM (
    SELECT budget, sum(settled) AS settled, sum(held) AS held, arg_max(cap, seq) AS cap, max(seq) AS last_seq
    FROM moves
    WHERE is_move
    GROUP BY budget
) AS m
JOIN batch AS b ON b.seq = m.last_seq
ON CONFLICT (budget) DO UPDATE SET
    settled_usd = budgets.settled_usd + excluded.settled_usd,
    held_usd = budgets.held_usd + excluded.held_usd,
    cap_usd = coalesce(excluded.cap_usd, budgets.cap_usd),
    last_id = excluded.last_id,
    last_seq = excluded.last_seq;
