-- Common questions about the projection, as views. They hold no rows, and the fold does not use them.
--
-- They are made again when a file is opened for writing after this text has changed, so older files get them too. No
-- view reads a clock (G5): "now" is the time of the newest event that is folded. Days and hours are in UTC, in any time
-- zone of the session. All views of spend add up to the same total, the settled spend of all users.

CREATE OR REPLACE VIEW newest_event AS
SELECT max(make_timestamptz(split_part(id, '-', 1)::BIGINT * 1000)) AS recorded_at
FROM position
WHERE seq > 0;

CREATE OR REPLACE VIEW spend_by_user AS
SELECT
    user_id,
    count(*) AS periods,
    sum(calls)::BIGINT AS calls,
    sum(denied)::BIGINT AS denied,
    sum(spent_usd)::DECIMAL(18, 9) AS spent_usd,
    sum(assumed_usd)::DECIMAL(18, 9) AS assumed_usd,
    sum(reserved_usd)::DECIMAL(18, 9) AS reserved_usd
FROM spend
GROUP BY user_id;

CREATE OR REPLACE VIEW spend_by_plan AS
SELECT
    period,
    plan,
    count(*) AS calls,
    count(DISTINCT user_id) AS users,
    sum(cost_usd)::DECIMAL(18, 9) AS spent_usd,
    sum(assumed_usd)::DECIMAL(18, 9) AS assumed_usd
FROM calls
WHERE reserved_at IS NOT NULL OR settled_at IS NOT NULL
GROUP BY period, plan;

CREATE OR REPLACE VIEW spend_by_campaign AS
SELECT
    period,
    campaign_id,
    count(*) AS calls,
    count(DISTINCT user_id) AS users,
    sum(cost_usd)::DECIMAL(18, 9) AS spent_usd,
    sum(assumed_usd)::DECIMAL(18, 9) AS assumed_usd
FROM calls
WHERE reserved_at IS NOT NULL OR settled_at IS NOT NULL
GROUP BY period, campaign_id;

CREATE OR REPLACE VIEW spend_by_task_type AS
SELECT
    period,
    task_type,
    count(*) AS calls,
    count(DISTINCT user_id) AS users,
    sum(cost_usd)::DECIMAL(18, 9) AS spent_usd,
    sum(assumed_usd)::DECIMAL(18, 9) AS assumed_usd
FROM calls
WHERE reserved_at IS NOT NULL OR settled_at IS NOT NULL
GROUP BY period, task_type;

-- An attempt's charge counts for its model once its hold is settled, and a correction for the model of the attempt that
-- it names. What a hold cost beyond its attempts (a worker died) counts for the last model that it asked.
--
-- A correction may take more than its attempt was charged: one of a whole call names no attempt of its own. `left_usd`
-- is what a hold had cost up to an attempt, at most what it had cost up to any later one; what an attempt adds to it is
-- never below zero, and all of them add up to what the hold cost. Only corrected holds need that.
CREATE OR REPLACE VIEW spend_by_model AS
WITH holds AS (
    SELECT
        partition,
        call_id,
        user_id,
        period,
        hold,
        bool_or(type = 'cost-recorded') AS is_settled,
        bool_or(type = 'cost-adjusted') AS is_corrected,
        arg_max(model, seq) AS model,
        sum(CASE type WHEN 'cost-recorded' THEN amount_usd WHEN 'model-called' THEN -charge_usd ELSE 0 END) AS rest_usd,
        coalesce(sum(prompt_tokens) FILTER (outcome = 'recorded'), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens) FILTER (outcome = 'recorded'), 0) AS completion_tokens
    FROM events
    WHERE type IN ('budget-reserved', 'model-called', 'fallback-used', 'cost-recorded', 'cost-adjusted')
    GROUP BY partition, call_id, user_id, period, hold
),
-- What each attempt of a corrected hold cost; what it cost beyond its attempts comes last.
costs AS (
    SELECT
        partition, call_id, user_id, period, hold, attempt,
        arg_max(model, seq) FILTER (type = 'model-called') AS model,
        sum(CASE type WHEN 'model-called' THEN charge_usd ELSE amount_usd END) AS cost_usd
    FROM events
    SEMI JOIN (FROM holds WHERE is_corrected AND is_settled) AS corrected USING (partition, call_id, user_id, period, hold)
    WHERE type IN ('model-called', 'cost-adjusted')
    GROUP BY partition, call_id, user_id, period, hold, attempt
    UNION ALL
    SELECT partition, call_id, user_id, period, hold, 2147483647, model, rest_usd
    FROM holds
    WHERE is_corrected AND is_settled
),
sums AS (
    SELECT *, sum(cost_usd) OVER (PARTITION BY partition, call_id, user_id, period, hold ORDER BY attempt) AS cost_so_far
    FROM costs
),
shares AS (
    SELECT
        *,
        greatest(0, min(cost_so_far) OVER (
            PARTITION BY partition, call_id, user_id, period, hold ORDER BY attempt
            ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING
        )) AS left_usd
    FROM sums
)
SELECT
    period,
    model,
    sum(attempts)::BIGINT AS attempts,
    sum(spent_usd)::DECIMAL(18, 9) AS spent_usd,
    sum(prompt_tokens)::BIGINT AS prompt_tokens,
    sum(completion_tokens)::BIGINT AS completion_tokens
FROM (
    SELECT
        period,
        model,
        count(*) AS attempts,
        sum(CASE WHEN corrected.hold IS NULL THEN charge_usd ELSE 0 END) AS spent_usd,
        coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens), 0) AS completion_tokens
    FROM events AS attempt
    -- An anti-join with the unsettled holds, since there are as many settled ones as calls.
    ANTI JOIN (FROM holds WHERE NOT is_settled) AS unsettled USING (partition, call_id, user_id, period, hold)
    LEFT JOIN (SELECT partition, call_id, user_id, period, hold FROM holds WHERE is_corrected) AS corrected
        USING (partition, call_id, user_id, period, hold)
    WHERE attempt.type = 'model-called'
    GROUP BY period, model
    UNION ALL
    SELECT
        period, model, 0, sum(CASE WHEN is_corrected THEN 0 ELSE rest_usd END), sum(prompt_tokens), sum(completion_tokens)
    FROM holds
    WHERE is_settled
    GROUP BY period, model
    UNION ALL
    SELECT period, coalesce(own_model, model), 0, sum(left_usd - before_usd), 0, 0
    FROM (
        SELECT
            period, c.model AS own_model, h.model, left_usd,
            coalesce(lag(left_usd) OVER (
                PARTITION BY partition, call_id, user_id, period, hold ORDER BY attempt
            ), 0) AS before_usd
        FROM shares AS c
        JOIN holds AS h USING (partition, call_id, user_id, period, hold)
    )
    GROUP BY ALL
)
GROUP BY period, model;

-- The calendar of the newest policy: its time zone, and the first day of its billing periods.
CREATE OR REPLACE VIEW policy_calendar AS
SELECT
    coalesce(arg_max(content->>'timezone', version), 'UTC') AS timezone,
    coalesce(arg_max((content->>'month_starts_on')::INTEGER, version), 1) AS month_starts_on
FROM policies;

CREATE OR REPLACE VIEW spend_by_day AS
SELECT
    (recorded_at AT TIME ZONE (SELECT timezone FROM policy_calendar))::DATE AS day,
    count(DISTINCT (partition, call_id)) AS calls,
    count(DISTINCT user_id) AS users,
    sum(amount_usd)::DECIMAL(18, 9) AS spent_usd,
    coalesce(sum(assumed_usd), 0)::DECIMAL(18, 9) AS assumed_usd
FROM events
WHERE type IN ('cost-recorded', 'cost-adjusted')
GROUP BY day;

CREATE OR REPLACE VIEW spend_by_hour AS
SELECT
    time_bucket(INTERVAL 1 HOUR, recorded_at) AS hour,
    count(DISTINCT (partition, call_id)) AS calls,
    count(DISTINCT user_id) AS users,
    sum(amount_usd)::DECIMAL(18, 9) AS spent_usd,
    coalesce(sum(assumed_usd), 0)::DECIMAL(18, 9) AS assumed_usd
FROM events
WHERE type IN ('cost-recorded', 'cost-adjusted')
GROUP BY hour;

-- A period begins on its first day in the policy's time zone, and for each user with the first event in it: a user who
-- came on the 25th has spent for days, not for weeks. The first day counts as a whole one, so that the estimate does not rest on a
-- few minutes. The mean and the day are estimates and may be rounded; no decision reads them.
CREATE OR REPLACE VIEW cap_use AS
SELECT
    user_id,
    period,
    plan,
    cap_usd,
    spent_usd,
    reserved_usd,
    (cap_usd - spent_usd)::DECIMAL(18, 9) AS left_usd,
    (100 * spent_usd::DOUBLE / nullif(cap_usd, 0)::DOUBLE)::DECIMAL(38, 2) AS used_percent,
    (spent_usd::DOUBLE / days)::DECIMAL(18, 9) AS mean_day_usd,
    CASE
        WHEN now_at >= end_at OR cap_usd IS NULL THEN NULL
        WHEN spent_usd >= cap_usd THEN now_at::DATE
        WHEN spent_usd <= 0 THEN NULL
        -- Compared before it is added: with a tiny spend, the date would be out of range.
        WHEN (cap_usd - spent_usd)::DOUBLE / (spent_usd::DOUBLE / days) < date_diff('second', now_at, end_at) / 86400
            THEN (now_at + to_seconds((cap_usd - spent_usd)::DOUBLE / (spent_usd::DOUBLE / days) * 86400))::DATE
    END AS runs_out_on
FROM (
    SELECT
        *,
        greatest(1, date_diff('second', greatest(start_at, begun_at), least(now_at, end_at)) / 86400) AS days
    FROM (
        SELECT
            spend.*,
            first_at AT TIME ZONE timezone AS begun_at,
            newest_event.recorded_at AT TIME ZONE timezone AS now_at,
            try_strptime(period, '%Y-%m') + to_days(month_starts_on - 1) AS start_at,
            try_strptime(period, '%Y-%m') + INTERVAL 1 MONTH + to_days(month_starts_on - 1) AS end_at
        FROM spend
        CROSS JOIN newest_event
        CROSS JOIN policy_calendar
    )
);

CREATE OR REPLACE VIEW denials AS
SELECT
    recorded_at,
    user_id,
    period,
    call_id,
    plan,
    task_type,
    campaign_id,
    reason,
    budget,
    amount_usd AS asked_usd,
    settled_usd,
    held_usd,
    cap_usd,
    (settled_usd + held_usd + amount_usd - cap_usd)::DECIMAL(18, 9) AS short_usd,
    partition,
    seq
FROM (
    SELECT
        *,
        usd((payload->>'$.settled_nanousd')::BIGINT) AS settled_usd,
        usd((payload->>'$.held_nanousd')::BIGINT) AS held_usd
    FROM events
    WHERE type = 'budget-denied'
);

CREATE OR REPLACE VIEW fallback_rates AS
SELECT
    model,
    count(*) FILTER (type = 'model-called') AS attempts,
    count(*) FILTER (type = 'model-called' AND outcome <> 'ok') AS failed,
    count(*) FILTER (type = 'fallback-used') AS fallbacks,
    (100 * count(*) FILTER (type = 'fallback-used') / nullif(count(*) FILTER (type = 'model-called'), 0))
        ::DECIMAL(38, 2) AS fallback_percent
FROM (
    SELECT type, outcome, CASE type WHEN 'fallback-used' THEN from_model ELSE model END AS model
    FROM events
    WHERE type IN ('model-called', 'fallback-used')
)
GROUP BY model;

CREATE OR REPLACE VIEW fallback_reasons AS
SELECT
    from_model AS model,
    model AS to_model,
    reason,
    http_status,
    count(*) AS fallbacks,
    (100 * count(*) / sum(count(*)) OVER (PARTITION BY from_model))::DECIMAL(38, 2) AS percent
FROM events
WHERE type = 'fallback-used'
GROUP BY from_model, model, reason, http_status;

-- Percentiles are measured latencies, not values interpolated between two.
CREATE OR REPLACE VIEW latency_by_model AS
SELECT
    model,
    count(*) AS answered,
    min(latency_ms) AS min_ms,
    quantile_disc(latency_ms, 0.5) AS p50_ms,
    quantile_disc(latency_ms, 0.9) AS p90_ms,
    quantile_disc(latency_ms, 0.95) AS p95_ms,
    quantile_disc(latency_ms, 0.99) AS p99_ms,
    max(latency_ms) AS max_ms
FROM events
WHERE type = 'model-called' AND outcome = 'ok'
GROUP BY model;

-- A correction is made for a hold, so an attempt's true cost is known if its hold has no other attempt or no correction.
-- A count of zero is not written into an event, so one of the two counts may be missing.
CREATE OR REPLACE VIEW token_prices AS
WITH corrected AS (
    SELECT
        partition,
        call_id,
        user_id,
        period,
        hold,
        sum(amount_usd) FILTER (type = 'cost-adjusted') AS correction_usd,
        count(*) FILTER (type = 'model-called') AS attempts
    FROM events
    SEMI JOIN (SELECT partition, call_id, user_id, period, hold FROM events WHERE type = 'cost-adjusted') AS correction
        USING (partition, call_id, user_id, period, hold)
    WHERE type IN ('model-called', 'cost-adjusted')
    GROUP BY partition, call_id, user_id, period, hold
)
SELECT
    period,
    model,
    count(*) AS attempts,
    coalesce(sum(prompt_tokens), 0)::BIGINT AS prompt_tokens,
    coalesce(sum(completion_tokens), 0)::BIGINT AS completion_tokens,
    sum(charge_usd + coalesce(correction_usd, 0))::DECIMAL(18, 9) AS charged_usd,
    (
        sum(charge_usd + coalesce(correction_usd, 0))::DOUBLE * 1000
        / nullif(coalesce(sum(prompt_tokens), 0) + coalesce(sum(completion_tokens), 0), 0)
    )::DECIMAL(38, 9) AS usd_per_1000_tokens
FROM events
LEFT JOIN corrected USING (partition, call_id, user_id, period, hold)
WHERE type = 'model-called'
    AND (prompt_tokens IS NOT NULL OR completion_tokens IS NOT NULL)
    AND basis IN ('reported', 'priced')
    AND coalesce(corrected.attempts, 1) = 1
GROUP BY period, model;

CREATE OR REPLACE VIEW cost_certainty AS
SELECT
    period,
    count(*) AS calls,
    count(*) FILTER (assumed_usd > 0) AS assumed_calls,
    sum(cost_usd)::DECIMAL(18, 9) AS spent_usd,
    (sum(cost_usd) - sum(assumed_usd))::DECIMAL(18, 9) AS confirmed_usd,
    sum(assumed_usd)::DECIMAL(18, 9) AS assumed_usd,
    (100 * sum(assumed_usd)::DOUBLE / nullif(sum(cost_usd), 0)::DOUBLE)::DECIMAL(38, 2) AS assumed_percent,
    sum(adjusted_usd)::DECIMAL(18, 9) AS adjusted_usd
FROM calls
WHERE settled_at IS NOT NULL
GROUP BY period;

CREATE OR REPLACE VIEW open_holds AS
SELECT
    user_id,
    call_id,
    period,
    task_type,
    plan,
    campaign_id,
    worker,
    model,
    hold,
    held_usd,
    opened_at,
    (date_diff('millisecond', opened_at, newest_event.recorded_at) / 1000)::DECIMAL(18, 3) AS open_s,
    make_timestamptz(deadline_ms * 1000) AS expires_at,
    partition,
    holds.seq
FROM (
    SELECT
        partition,
        call_id,
        user_id,
        period,
        hold,
        arg_max(task_type, seq) AS task_type,
        arg_max(plan, seq) AS plan,
        arg_max(campaign_id, seq) AS campaign_id,
        arg_max(worker, seq) AS worker,
        arg_max(model, seq) AS model,
        sum(amount_usd)::DECIMAL(18, 9) AS held_usd,
        min(recorded_at) AS opened_at,
        arg_max((payload->>'$.deadline_ms')::BIGINT, seq) FILTER (kind = 'hold') AS deadline_ms,
        min(seq) AS seq
    FROM events AS reserved
    ANTI JOIN (SELECT partition, call_id, hold FROM events WHERE type = 'cost-recorded') AS settled
        USING (partition, call_id, hold)
    WHERE type = 'budget-reserved'
    GROUP BY partition, call_id, user_id, period, hold
) AS holds
CROSS JOIN newest_event;
