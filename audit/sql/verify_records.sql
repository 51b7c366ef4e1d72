-- Records of calls that the events do not give: each with what Redis holds and what the events give.
WITH open AS (
    SELECT DISTINCT call_id
    FROM verify_calls
    WHERE partition = $partition AND hold > 0 AND hold_type = 'budget-reserved'
    GROUP BY call_id, life, hold
    HAVING count(*) FILTER (type = 'cost-recorded') = 0
),
-- Only calls with a record, and those that must have one: most calls of a long ledger are neither.
wanted AS (
    SELECT call_id FROM gate_records
    UNION
    SELECT call_id FROM open
),
latest AS (
    SELECT *
    FROM verify_calls
    SEMI JOIN wanted USING (call_id)
    WHERE partition = $partition
    QUALIFY life = max(life) OVER (PARTITION BY call_id)
),
holds AS (
    SELECT
        call_id, hold, sum(amount) FILTER (type IN ('cost-recorded', 'cost-adjusted'))::BIGINT AS cost,
        sum(assumed) FILTER (type IN ('cost-recorded', 'cost-adjusted'))::BIGINT AS assumed,
        coalesce(sum(amount) FILTER (type = 'budget-reserved'), 0)::BIGINT AS held,
        count(*) FILTER (type = 'cost-recorded') > 0 AS is_settled
    FROM latest
    WHERE hold_type = 'budget-reserved' OR (is_single AND type = 'cost-recorded') OR type = 'cost-adjusted'
    GROUP BY call_id, hold
),
calls AS (
    SELECT
        l.call_id, any_value(l.first_user) AS user_id, coalesce(max(l.hold) FILTER (l.kind = 'hold'), 0) AS hold,
        coalesce(bool_or(l.type = 'budget-denied'), false) AS is_denied,
        coalesce(string_agg(
            CASE l.type WHEN 'model-called' THEN 'm' ELSE 'f' END || l.attempt, ' '
            ORDER BY l.type = 'model-called', l.attempt::VARCHAR
        ) FILTER (l.type IN ('model-called', 'fallback-used')), '') AS attempts
    FROM latest AS l
    GROUP BY l.call_id
),
given AS (
    SELECT
        c.call_id, c.user_id, c.hold, c.attempts,
        CASE WHEN c.is_denied THEN 'denied' WHEN h.held IS NOT NULL AND NOT h.is_settled THEN 'open' ELSE 'over' END
            AS state,
        CASE WHEN h.held IS NOT NULL AND NOT h.is_settled THEN h.held ELSE 0 END AS held,
        coalesce(s.settled, '') AS settled
    FROM calls AS c
    LEFT JOIN holds AS h ON h.call_id = c.call_id AND h.hold = c.hold AND c.hold > 0
    LEFT JOIN (
        SELECT call_id, string_agg(format('{}={},{}', hold, cost, assumed), ' ' ORDER BY hold) AS settled
        FROM holds
        WHERE is_settled
        GROUP BY call_id
    ) AS s ON s.call_id = c.call_id
)
SELECT
    call_id, coalesce(r.user_id, g.user_id) AS user_id,
    CASE WHEN r.call_id IS NOT NULL THEN format('state {}, hold {} of {}, attempts "{}", settled "{}"', r.state, r.hold, r.held, r.attempts, r.settled)
        END AS found,
    CASE WHEN g.call_id IS NOT NULL THEN format('state {}, hold {} of {}, attempts "{}", settled "{}"', g.state, g.hold, g.held, g.attempts, g.settled)
        END AS given
FROM gate_records AS r
FULL JOIN given AS g USING (call_id)
ANTI JOIN gate_later AS l ON l.kind = 'call' AND l.name = call_id
WHERE (r.call_id IS NULL AND g.state = 'open')
    OR (r.call_id IS NOT NULL AND (r.user_id, r.state, r.hold, r.held, r.settled, r.attempts)
        IS DISTINCT FROM (g.user_id, g.state, g.hold, g.held, g.settled, g.attempts)) -- audits G2 G4
ORDER BY call_id;
