-- The cap in force at each hold. For a user's own period, it is the cap that the ledger assigned last, else that of the
-- policy in force for the user or the plan, with the credit granted and not taken back up to then. For other budgets it
-- is that of the policy, with the budget's credit; a budget that the policy has no more limits nothing. Before the first policy, and where the
-- ledger assigned no cap, it is the cap that was stamped.
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
),
reserved AS (
    SELECT
        r.*, p.version AS policy_version, a.cap AS assigned_cap, coalesce(CASE WHEN r.is_own THEN g.credit ELSE o.credit END, 0) AS given_credit,
        CASE WHEN p.version IS NULL THEN NULL
            WHEN r.is_own THEN coalesce(u.cap, l.cap)
            ELSE coalesce(v.cap, n.cap, 1000000000000000) END AS policy_cap
    FROM verify_reserved AS r
    ASOF LEFT JOIN assigned AS a ON a.partition = r.partition AND a.user_id = r.user_id AND a.seq < r.seq
    ASOF LEFT JOIN granted AS g
        ON g.partition = r.partition AND g.user_id = r.user_id AND g.period = r.period AND g.seq < r.seq
    ASOF LEFT JOIN of_budgets AS o ON o.partition = r.partition AND o.budget = r.budget AND o.seq < r.seq
    ASOF LEFT JOIN policies AS p ON p.partition = r.partition AND p.seq < r.seq
    LEFT JOIN verify_policy_caps AS u ON r.is_own AND u.partition = p.partition AND u.seq = p.seq
        AND u.subject = 'user:' || r.user_id
    LEFT JOIN verify_policy_caps AS l ON r.is_own AND l.partition = p.partition AND l.seq = p.seq
        AND l.subject = 'plan:' || r.plan
    -- A budget's name is the name of its rule, a value and a window, between colons; only the value may hold colons.
    LEFT JOIN verify_policy_caps AS v ON NOT r.is_own AND v.partition = p.partition AND v.seq = p.seq
        AND v.subject = regexp_replace(r.budget, ':[^:]*$', '')
    LEFT JOIN verify_policy_caps AS n ON NOT r.is_own AND n.partition = p.partition AND n.seq = p.seq
        AND n.subject = split_part(r.budget, ':', 1)
)
SELECT
    * EXCLUDE (assigned_cap, given_credit, policy_cap),
    CASE
        WHEN is_own AND (assigned_cap IS NOT NULL OR policy_version IS NOT NULL)
            THEN least(coalesce(assigned_cap, policy_cap) + given_credit, 1000000000000000)::BIGINT
        WHEN policy_version IS NOT NULL THEN least(policy_cap + given_credit, 1000000000000000)::BIGINT
        ELSE stamped
    END AS cap,
    CASE WHEN is_own AND assigned_cap IS NULL AND policy_version IS NULL THEN given_credit ELSE 0 END AS credit,
    assigned_cap IS NOT NULL AS is_assigned
FROM reserved;
