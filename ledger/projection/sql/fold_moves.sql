-- One row for each event of the batch and each budget that it names: what it moves, what the gate stamped, and the
-- balance as summed up here. The user's own budget comes from the envelope, further ones from the payload.
-- One running sum goes over all budgets in turn; `start` subtracts what came before a budget's own rows.
CREATE OR REPLACE TEMP TABLE moves AS
WITH named AS (
    SELECT seq, type, amount_usd, hold_usd, user_budget(user_id, period) AS budget, committed_usd AS stamped, cap_usd
    FROM events
    WHERE partition = $partition AND seq BETWEEN $first AND $last AND user_id <> '' AND period <> ''
    UNION ALL
    SELECT seq, type, amount_usd, hold_usd, further.budget, usd(further.committed_nanousd), usd(further.cap_nanousd)
    FROM (
        SELECT
            seq, type, amount_usd, hold_usd,
            unnest(json_transform(payload, '{"budgets": [
                {"budget": "VARCHAR", "cap_nanousd": "BIGINT", "committed_nanousd": "BIGINT"}
            ]}').budgets) AS further
        FROM events
        -- Most payloads name no budget. In JSON, any name may be written with escapes.
        WHERE partition = $partition AND seq BETWEEN $first AND $last AND (contains(payload, 'budgets') OR contains(payload, '\u'))
    )
    ${only_own}
),
moved AS (
    SELECT
        seq,
        budget,
        stamped,
        CASE WHEN type IN ('budget-reserved', 'budget-opened') THEN coalesce(cap_usd, 0) END AS cap,
        type IN ('budget-reserved', 'cost-recorded', 'cost-adjusted', 'budget-opened') AS is_move,
        CASE WHEN type IN ('cost-recorded', 'cost-adjusted', 'budget-opened') THEN amount_usd ELSE 0 END AS settled,
        CASE type
            WHEN 'budget-reserved' THEN amount_usd
            WHEN 'cost-recorded' THEN -hold_usd
            WHEN 'budget-opened' THEN coalesce(hold_usd, 0)
            ELSE 0
        END AS held
    FROM named
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
        coalesce(b.settled_usd + b.held_usd, 0) + t.total - sum(t.total) OVER numbered AS start
    FROM totals AS t
    LEFT JOIN budgets AS b ON b.budget = t.budget
    WINDOW numbered AS (ORDER BY t.budget ROWS UNBOUNDED PRECEDING)
)
SELECT
    m.*,
    (s.start + sum(m.settled + m.held) OVER (ORDER BY s.number, m.seq ROWS UNBOUNDED PRECEDING))::DECIMAL(18, 9)
        AS recomputed
FROM moved AS m
JOIN starts AS s ON s.budget = m.budget;
