-- Every event of a call, with what came before it in that call's life. The record of a finished call expires, after a
-- month at the earliest; its id may then begin a new life.
CREATE OR REPLACE TEMP TABLE verify_calls AS
WITH calls_events AS (
    SELECT
        partition, seq, id, epoch_ms(recorded_at) AS ms, type, user_id, period, call_id, attempt,
        nanousd(amount_usd) AS amount, kind, coalesce(hold, 0) AS hold, nanousd(hold_usd) AS freed,
        nanousd(overage_usd) AS overage, coalesce(nanousd(assumed_usd), 0) AS assumed, basis, outcome,
        type IN ('budget-denied', 'plan-assigned', 'plan-cleared', 'credit-granted', 'credit-revoked', 'credit-expired',
            'key-created', 'key-revoked')
            OR coalesce(outcome = 'recorded', false)
            AND type = 'cost-recorded' AS is_single
    FROM events
    WHERE type NOT IN ('segment-sealed', 'ledger-recovered', 'policy-applied', 'alert-raised', 'budget-opened')
),
-- Only calls that last longer than that may have expired in between. They are few, so only these are searched for gaps.
long AS (
    SELECT partition, call_id
    FROM calls_events
    GROUP BY partition, call_id
    HAVING max(ms) - min(ms) >= $forgotten_ms
),
gaps AS (
    SELECT
        *,
        (is_single OR (kind = 'hold' AND hold = 1))
            AND ms - lag(ms) OVER (PARTITION BY partition, call_id ORDER BY seq) >= $forgotten_ms AS begins_again
    FROM calls_events
    SEMI JOIN long USING (partition, call_id)
),
lives AS (
    SELECT * EXCLUDE (ms), 0 AS life
    FROM calls_events
    ANTI JOIN long USING (partition, call_id)
    UNION ALL
    SELECT
        * EXCLUDE (begins_again, ms),
        count(*) FILTER (begins_again) OVER (PARTITION BY partition, call_id ORDER BY seq) AS life
    FROM gaps
),
-- Attempts that are recorded more than once.
repeated AS (
    SELECT partition, call_id, life, type, attempt, min(seq) AS recorded_seq
    FROM lives
    WHERE type IN ('model-called', 'fallback-used')
    GROUP BY partition, call_id, life, type, attempt
    HAVING count(*) > 1
)
SELECT
    *,
    first_value(user_id) OVER of_life AS first_user,
    coalesce(max(hold) FILTER (kind = 'hold') OVER before, 0) AS opened,
    coalesce(max(hold) FILTER (type = 'cost-recorded' AND outcome <> 'recorded') OVER before, 0) AS closed,
    coalesce(max(attempt) FILTER (type IN ('budget-reserved', 'model-called')) OVER before, 0) AS attempts,
    coalesce(bool_or(is_single OR (type = 'cost-recorded' AND outcome = 'done')) OVER before, false) AS is_over,
    first_value(type) OVER of_hold AS hold_type,
    first_value(period) OVER of_hold AS hold_period,
    coalesce(sum(amount) FILTER (type = 'budget-reserved') OVER hold_before, 0) AS held,
    max(outcome) FILTER (type = 'cost-recorded') OVER hold_before AS settled_as,
    coalesce(sum(amount) FILTER (type IN ('cost-recorded', 'cost-adjusted')) OVER of_hold, 0) AS cost,
    coalesce(seq > recorded_seq, false) AS is_repeated
FROM lives
LEFT JOIN repeated USING (partition, call_id, life, type, attempt)
WINDOW
    of_life AS (PARTITION BY partition, call_id, life ORDER BY seq),
    before AS (PARTITION BY partition, call_id, life ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
    of_hold AS (PARTITION BY partition, call_id, life, hold ORDER BY seq),
    hold_before AS (
        PARTITION BY partition, call_id, life, hold ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    );
