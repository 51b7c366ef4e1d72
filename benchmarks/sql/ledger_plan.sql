-- A ledger drawn from a seed: every type of event, calls that end in every way, several periods, budgets beside the
-- user's own; stamped as the gate stamps. One narrow row for each event; ledger_events.sql writes them out.
--
-- `dice(what, call)` is a number from 0 to 999,999 that depends on the seed, the call and the purpose `what`.
CREATE OR REPLACE MACRO dice(what, call) AS (hash(what, call, getvariable('seed')) % 1000000)::BIGINT;
CREATE OR REPLACE MACRO month_of(ms) AS strftime(make_timestamp(ms * 1000), '%Y-%m');

-- Percentage of calls -> {steps of such a call}. `hold2` is the second hold of a call that was taken over.
CREATE OR REPLACE TEMP TABLE lives AS
SELECT unnest([
    {'name': 'done', 'share': 56, 'steps': ['hold', 'ok', 'done']},
    {'name': 'beyond the hold', 'share': 2, 'steps': ['hold', 'ok', 'over']},
    {'name': 'fallback', 'share': 6, 'steps': ['hold', 'bad', 'fallback', 'ok', 'done']},
    {'name': 'fallback, extended', 'share': 3, 'steps': ['hold', 'bad', 'extension', 'fallback', 'ok', 'done']},
    {'name': 'failed', 'share': 5, 'steps': ['hold', 'bad', 'failed']},
    {'name': 'expired', 'share': 4, 'steps': ['hold', 'expired']},
    {'name': 'expired, answered late', 'share': 3, 'steps': ['hold', 'expired', 'ok', 'late']},
    {'name': 'taken over', 'share': 4, 'steps': ['hold', 'taken_over', 'hold2', 'ok', 'done']},
    {'name': 'corrected', 'share': 2, 'steps': ['hold', 'ok', 'done', 'correction']},
    {'name': 'denied', 'share': 6, 'steps': ['denied']},
    {'name': 'charged', 'share': 4, 'steps': ['charge']},
    {'name': 'plan', 'share': 1, 'steps': ['plan']},
    {'name': 'credit', 'share': 2, 'steps': ['credit']},
    {'name': 'credit of a prepaid budget', 'share': 1, 'steps': ['paid']},
    {'name': 'alert', 'share': 1, 'steps': ['alert']}
], recursive := true);

CREATE OR REPLACE TEMP TABLE shares AS
SELECT row_number() OVER () - 1 AS number, steps
FROM (SELECT steps, unnest(range(share)) FROM lives);

-- Calls begin one after the other and overlap; users are drawn unevenly, so that some have many calls.
CREATE OR REPLACE TEMP TABLE steps AS
WITH calls AS (
    SELECT
        n AS call,
        ((dice('user', n) / 1000000.0) ^ 2 * getvariable('users'))::INTEGER AS user,
        1 + dice('pace', n) % 40 AS pace,
        getvariable('start_ms') + n * getvariable('span_ms') // getvariable('calls') AS begun_ms,
        s.steps
    FROM range(getvariable('calls')) AS t(n)
    JOIN shares AS s ON s.number = dice('life', n) % 100
),
steps AS (
    SELECT call, user, begun_ms, pace, unnest(steps) AS step, generate_subscripts(steps, 1) AS place
    FROM calls
)
SELECT
    call, user, month_of(begun_ms) AS period, begun_ms, step, place,
    -- The amount that a step holds or frees, and the amount that it books.
    CASE step WHEN 'hold' THEN 31000000 WHEN 'hold2' THEN 29000000 WHEN 'extension' THEN 7000000
        WHEN 'denied' THEN 900000000000 + dice('amount', call)
        WHEN 'credit' THEN 1000000000 + dice('amount', call) WHEN 'paid' THEN 1000000000 ELSE 0 END::BIGINT AS asked,
    CASE
        WHEN step IN ('expired', 'taken_over') THEN 31000000
        WHEN step = 'over' THEN 31000000 + dice('cost', call)
        WHEN step IN ('correction', 'late') THEN -(200000 + dice('correction', call) // 10)
        WHEN step IN ('done', 'charge') THEN 400000 + dice('cost', call)
        ELSE 0
    END::BIGINT AS cost,
    call + (place - 1) * pace AS moment
FROM steps
WHERE moment < getvariable('calls');

-- `seq` leaves room for the `segment-sealed` event of each segment, after the first event of the next segment.
CREATE OR REPLACE TEMP TABLE plan AS
WITH numbered AS (
    SELECT *, row_number() OVER (ORDER BY moment, call, place) AS number
    FROM steps
),
seated AS (
    SELECT
        * EXCLUDE (number, moment),
        number + if(getvariable('segment') > 1, greatest(0, (number - 3) // (getvariable('segment') - 1)), 0) AS seq,
        (getvariable('start_ms') + moment * getvariable('span_ms') // getvariable('calls')) // 1000 * 1000 AS ms,
        begun_ms // 86400000 AS day,
        if(call % 7 = 0, call % 5, NULL) AS campaign
    FROM numbered
    WHERE seq <= getvariable('events')
),
lifelines AS (
    SELECT
        *,
        (count(*) FILTER (step IN ('taken_over', 'fallback')) OVER before + 1)::INTEGER AS attempt,
        CASE WHEN step IN ('denied', 'charge', 'plan', 'credit', 'paid', 'alert') THEN 0
            ELSE count(*) FILTER (step IN ('hold', 'hold2')) OVER of_call END::INTEGER AS hold,
        CASE WHEN step IN ('taken_over', 'done', 'over', 'failed', 'expired')
            THEN sum(CASE WHEN step IN ('hold', 'extension', 'hold2') THEN asked WHEN step = 'taken_over' THEN -31000000
                ELSE 0 END) OVER before ELSE 0 END::BIGINT AS freed,
        CASE WHEN step IN ('hold', 'hold2', 'extension') THEN asked ELSE 0 END::BIGINT AS opened
    FROM seated
    WINDOW
        of_call AS (PARTITION BY call ORDER BY place ROWS UNBOUNDED PRECEDING),
        before AS (PARTITION BY call ORDER BY place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
)
SELECT
    * EXCLUDE (day, opened),
    2 * row_number() OVER (PARTITION BY ms ORDER BY seq) AS n,
    (sum(cost) OVER own)::BIGINT AS settled,
    (sum(opened - freed) OVER own)::BIGINT AS held,
    (sum(if(step = 'credit', asked, 0)) OVER own)::BIGINT AS credit,
    if(user % 10 < 3, (sum(cost + opened - freed) OVER (PARTITION BY user, day ORDER BY seq ROWS UNBOUNDED PRECEDING))::BIGINT, NULL)
        AS day_committed,
    if(campaign IS NULL, NULL, (sum(cost + opened - freed)
        OVER (PARTITION BY campaign, period ORDER BY seq ROWS UNBOUNDED PRECEDING))::BIGINT) AS campaign_committed,
    count(*) FILTER (step = 'plan') OVER (PARTITION BY user ORDER BY seq ROWS UNBOUNDED PRECEDING) > 0 AS is_assigned
FROM lifelines
WINDOW own AS (PARTITION BY user, period ORDER BY seq ROWS UNBOUNDED PRECEDING)
ORDER BY seq;
