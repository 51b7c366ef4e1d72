-- One row for each event and budget it speaks of: what it moves, what the gate stamped, and the
-- balance as summed up here. The user's own budget comes from the envelope, further ones from the payload.
-- One running sum goes over all budgets, numbered; `start` takes off what came before a budget's own rows.
CREATE OR REPLACE TEMP TABLE moves AS
WITH spoken AS (
    SELECT seq, type, amount, hold_nanousd, account AS budget, committed AS stamped, cap_nanousd AS cap
    FROM batch
    WHERE user_id <> '' AND period <> ''
    UNION ALL
    SELECT seq, type, amount, hold_nanousd, e.budget, e.committed_nanousd, e.cap_nanousd
    FROM (SELECT seq, type, amount, hold_nanousd, unnest(budgets) AS e FROM batch WHERE budgets IS NOT NULL)
),
moved AS (
    SELECT
        seq,
        budget,
        stamped,
        CASE WHEN type = 'budget-reserved' THEN coalesce(cap, 0) END AS cap,
        type IN ('budget-reserved', 'cost-recorded', 'cost-adjusted') AS is_move,
        CASE WHEN type IN ('cost-recorded', 'cost-adjusted') THEN amount ELSE 0 END AS settled,
        CASE type WHEN 'budget-reserved' THEN amount WHEN 'cost-recorded' THEN -coalesce(hold_nanousd, 0)
            ELSE 0 END AS held
    FROM spoken
),
totals AS (
    SELECT budget, sum(settled + held) AS total
    FROM moved
    GROUP BY budget
),
starts AS (
    SELECT
        t.budget,
        row_number() OVER numbered AS number,
        coalesce(nanousd(b.settled_usd + b.held_usd), 0) + t.total - sum(t.total) OVER numbered AS start
    FROM totals AS t
    LEFT JOIN budgets AS b ON b.budget = t.budget
    WINDOW numbered AS (ORDER BY t.budget ROWS UNBOUNDED PRECEDING)
)
SELECT
    m.*,
    (s.start + sum(m.settled + m.held) OVER (ORDER BY s.number, m.seq ROWS UNBOUNDED PRECEDING))::BIGINT AS recomputed
FROM moved AS m
JOIN starts AS s ON s.budget = m.budget;
