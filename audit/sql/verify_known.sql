-- Caps that are on no event, before the first policy: of plans and users by the settings, and of further budgets. Each stamp must be one that the
-- settings or an event know for the plan or budget. One below all of them is only noted: nobody could overspend by it.
WITH known AS (
    SELECT subject, cap
    FROM verify_known_caps
    UNION
    SELECT 'plan:' || plan, nanousd(cap_usd)
    FROM events
    WHERE type = 'plan-assigned'
),
stamps AS (
    SELECT
        partition, budget, stamped, credit, is_own, min(seq) AS seq, arg_min(id, seq) AS id,
        CASE
            WHEN NOT is_own THEN split_part(budget, ':', 1)
            WHEN 'user:' || user_id IN (SELECT subject FROM known) THEN 'user:' || user_id
            ELSE 'plan:' || plan
        END AS subject
    FROM verify_caps
    WHERE NOT (is_own AND is_assigned) AND policy_version IS NULL
    GROUP BY ALL
),
wanted AS (
    SELECT s.*, list(DISTINCT k.cap ORDER BY k.cap) FILTER (k.cap IS NOT NULL) AS caps
    FROM stamps AS s
    LEFT JOIN known AS k USING (subject)
    GROUP BY ALL
)
SELECT partition, seq, id, budget,
    format('the cap is stamped {} nano-dollars, by settings and events {} has {}{}', stamped,
        replace(subject, ':', ' '), coalesce(array_to_string(caps, ' or '), 'none'),
        CASE WHEN credit > 0 THEN format(', and {} of credit', credit) ELSE '' END) AS problem,
    coalesce(stamped < list_min(caps) + credit, false) AS is_note
FROM wanted
WHERE caps IS NULL
    OR NOT list_contains(list_transform(caps, lambda cap: least(cap + credit, 1000000000000000)), stamped) -- audits G1
ORDER BY partition, seq;
