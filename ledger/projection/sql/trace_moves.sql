-- What the gate must have written on the tails for the moves just folded: for each budget, the digest of its entries
-- after the watermark, and the balance after the last. A budget with many moves is read in several parts.
WITH placed AS (
    SELECT
        m.budget, m.seq, i.id, i.ms, i.n,
        i.id || ' ' || nanousd(m.settled) || ' ' || nanousd(m.held) AS entry
    FROM moves AS m
    JOIN incoming AS i ON i.seq = m.seq
    WHERE m.is_move AND (i.ms, i.n) > ($ms, $n)
),
many AS (
    SELECT budget
    FROM placed
    GROUP BY budget
    HAVING count(*) > 4000
),
parts AS (
    SELECT
        budget, CASE WHEN budget IN (FROM many) THEN seq // 4096 ELSE 0 END AS part,
        count(*) AS entries, sha1(string_agg(entry, ';' ORDER BY seq)) AS digest,
        arg_max(ms, seq) AS ms, arg_max(n, seq) AS n, max(seq) AS last_seq
    FROM placed
    GROUP BY ALL
)
SELECT
    p.budget,
    lag(p.ms, 1, $ms) OVER of_budget AS after_ms,
    lag(p.n, 1, $n) OVER of_budget AS after_n,
    p.entries,
    p.digest,
    CASE WHEN p.last_seq = b.last_seq THEN nanousd(b.settled_usd) || ' ' || nanousd(b.held_usd) END AS balance
FROM parts AS p
JOIN budgets AS b ON b.budget = p.budget
WINDOW of_budget AS (PARTITION BY p.budget ORDER BY p.part);
