-- The cap in force at each hold. For a user's own period, it is the cap that the ledger assigned last, with the credit
-- granted and not taken back up to then; without an assigned cap, and for other budgets, it is the cap that was stamped.
-- `credit` is the part of a stamped cap that events give.
CREATE OR REPLACE TEMP TABLE verify_caps AS
WITH assigned AS (
    SELECT partition, user_id, seq, nanousd(cap_usd) AS cap
    FROM events
    WHERE type IN ('plan-assigned', 'plan-cleared')
),
granted AS (
    SELECT
        partition, user_id, period, seq,
        sum(nanousd(amount_usd)) OVER (PARTITION BY partition, user_id, period ORDER BY seq) AS credit
    FROM events
    WHERE type IN ('credit-granted', 'credit-revoked') AND budget IS NULL
),
of_budgets AS (
    SELECT
        partition, budget, seq,
        sum(nanousd(amount_usd)) OVER (PARTITION BY partition, budget ORDER BY seq) AS credit
    FROM events
    WHERE type IN ('credit-granted', 'credit-revoked', 'credit-expired') AND budget IS NOT NULL
)
SELECT
    r.*,
    CASE WHEN r.is_own AND a.cap IS NOT NULL THEN least(a.cap + coalesce(g.credit, 0), 1000000000000000)::BIGINT
        ELSE r.stamped END AS cap,
    CASE WHEN NOT r.is_own THEN coalesce(o.credit, 0) WHEN a.cap IS NULL THEN coalesce(g.credit, 0) ELSE 0 END
        AS credit,
    a.cap IS NOT NULL AS is_assigned
FROM verify_reserved AS r
ASOF LEFT JOIN assigned AS a ON a.partition = r.partition AND a.user_id = r.user_id AND a.seq < r.seq
ASOF LEFT JOIN granted AS g
    ON g.partition = r.partition AND g.user_id = r.user_id AND g.period = r.period AND g.seq < r.seq
ASOF LEFT JOIN of_budgets AS o ON o.partition = r.partition AND o.budget = r.budget AND o.seq < r.seq;
