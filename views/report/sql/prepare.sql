-- What a report asks again and again, made once from a copy of the projection: temporary tables beside it.
--
-- A call's plan and campaign stand on few of its events, and every question may be narrowed by them, so each event of
-- money, attempt or fallback is given its call's. Times are TIMESTAMP in UTC: buckets of TIMESTAMPTZ go through a
-- calendar, at fifty times the cost (DuckDB 1.5, November 2026).

-- As the view `calls`, of which it takes a part at half the cost: the order stands on holds and refusals, and money
-- spent elsewhere has none.
CREATE TEMP TABLE report_calls AS
SELECT row_number() OVER () AS call_no, *
FROM (
    SELECT
        partition,
        call_id,
        user_id,
        period,
        arg_max(plan, seq) AS plan,
        arg_max(campaign_id, seq) AS campaign_id,
        -- As the views of spend count them: let through, or charged from elsewhere.
        bool_or(type <> 'budget-denied') AS is_made
    FROM events
    WHERE type IN ('budget-reserved', 'budget-denied') OR (type = 'cost-recorded' AND outcome = 'recorded')
    GROUP BY partition, call_id, user_id, period
);

CREATE TEMP TABLE report_events AS
SELECT
    c.call_no,
    c.user_id,
    c.period,
    c.plan,
    c.campaign_id,
    e.type,
    make_timestamp(epoch_us(e.recorded_at)) AS recorded,
    e.hold,
    e.attempt,
    e.seq,
    e.amount_usd,
    e.hold_usd,
    e.assumed_usd,
    e.charge_usd,
    e.basis,
    e.model,
    e.from_model,
    e.outcome,
    e.reason,
    e.http_status,
    e.latency_ms,
    e.prompt_tokens,
    e.completion_tokens
FROM events AS e
JOIN report_calls AS c USING (partition, call_id, user_id, period)
WHERE e.type IN ('budget-reserved', 'model-called', 'fallback-used', 'cost-recorded', 'cost-adjusted');

-- The further budgets of each call. Most payloads name none; in JSON, any name may be written with escapes.
CREATE TEMP TABLE report_budgets AS
SELECT DISTINCT c.call_no, further.budget
FROM (
    SELECT partition, call_id, user_id, period, unnest(from_json(payload->'budgets', '[{"budget": "VARCHAR"}]')) AS further
    FROM events
    WHERE type IN ('budget-reserved', 'cost-recorded') AND (contains(payload, 'budgets') OR contains(payload, '\u'))
) AS e
JOIN report_calls AS c USING (partition, call_id, user_id, period);

CREATE TEMP TABLE report_denials AS
SELECT * REPLACE (make_timestamp(epoch_us(recorded_at)) AS recorded_at) FROM denials;

CREATE TEMP TABLE report_cap_use AS FROM cap_use;

-- An id has no space, so that these words are no campaign and no plan.
CREATE TEMP MACRO is_chosen(value, wanted) AS wanted IS NULL OR coalesce(value, 'not named') = wanted;

CREATE TEMP MACRO chosen_calls(period_, plan_, user_, campaign_) AS TABLE
FROM report_calls
WHERE is_chosen(period, period_) AND is_chosen(plan, plan_) AND is_chosen(user_id, user_)
    AND is_chosen(campaign_id, campaign_);

CREATE TEMP MACRO chosen_events(period_, plan_, user_, campaign_) AS TABLE
FROM report_events
WHERE is_chosen(period, period_) AND is_chosen(plan, plan_) AND is_chosen(user_id, user_)
    AND is_chosen(campaign_id, campaign_);

CREATE TEMP MACRO chosen_denials(period_, plan_, user_, campaign_) AS TABLE
FROM report_denials
WHERE is_chosen(period, period_) AND is_chosen(plan, plan_) AND is_chosen(user_id, user_)
    AND is_chosen(campaign_id, campaign_);

-- A cap is a user's: with a plan or campaign chosen, it is shown whole for the users who have such a call.
CREATE TEMP MACRO chosen_cap_use(period_, plan_, user_, campaign_) AS TABLE
FROM report_cap_use AS use
WHERE is_chosen(period, period_) AND is_chosen(user_id, user_)
    AND (
        (plan_ IS NULL AND campaign_ IS NULL)
        OR EXISTS (
            FROM report_calls AS c
            WHERE c.user_id = use.user_id AND c.period = use.period AND is_chosen(c.plan, plan_)
                AND is_chosen(c.campaign_id, campaign_)
        )
    );
