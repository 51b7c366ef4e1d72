-- The projection of the ledger: a pure function of its events (G5).
--
-- Public contract: events, calls, spend, budgets, position, discrepancies; and views.sql. Nothing here comes from a
-- clock or depends on where a batch ended. Money is DECIMAL(18,9) dollars, exact to the nano-dollar.
-- `events` has no index, since it is only appended to and its row groups are in order of arrival. With Zstandard, its
-- payloads need a third of the space, and less time, than with the compression that DuckDB chooses by default.

CREATE TABLE events (
    partition INTEGER NOT NULL,
    seq BIGINT NOT NULL,
    id VARCHAR NOT NULL,
    recorded_at TIMESTAMPTZ NOT NULL,
    type VARCHAR NOT NULL,
    v INTEGER NOT NULL,
    user_id VARCHAR NOT NULL,
    period VARCHAR NOT NULL,
    call_id VARCHAR NOT NULL,
    attempt INTEGER NOT NULL,
    amount_usd DECIMAL(18, 9) NOT NULL,
    committed_usd DECIMAL(18, 9),
    kind VARCHAR,
    hold INTEGER,
    hold_usd DECIMAL(18, 9),
    cap_usd DECIMAL(18, 9),
    budget VARCHAR,
    task_type VARCHAR,
    stream VARCHAR,
    plan VARCHAR,
    campaign_id VARCHAR,
    worker VARCHAR,
    model VARCHAR,
    model_used VARCHAR,
    from_model VARCHAR,
    outcome VARCHAR,
    basis VARCHAR,
    reason VARCHAR,
    http_status INTEGER,
    error VARCHAR,
    latency_ms BIGINT,
    prompt_tokens BIGINT,
    completion_tokens BIGINT,
    cached_tokens BIGINT,
    cache_write_tokens BIGINT,
    reasoning_tokens BIGINT,
    generation_id VARCHAR,
    finish_reason VARCHAR,
    charge_usd DECIMAL(18, 9),
    assumed_usd DECIMAL(18, 9),
    overage_usd DECIMAL(18, 9),
    author VARCHAR,
    payload JSON NOT NULL USING COMPRESSION zstd
);

-- A single key column: a point read by a two-column key does not use the index (DuckDB 1.5, November 2026).
CREATE TABLE budgets (
    budget VARCHAR PRIMARY KEY,
    partition INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    "value" VARCHAR NOT NULL,
    "window" VARCHAR NOT NULL,
    settled_usd DECIMAL(18, 9) NOT NULL,
    held_usd DECIMAL(18, 9) NOT NULL,
    cap_usd DECIMAL(18, 9),
    last_id VARCHAR NOT NULL,
    last_seq BIGINT NOT NULL,
    checksum UBIGINT NOT NULL
);

-- A view, since a call's events are spread over batches, and updating its row would cost more than the rest of the
-- fold. Grouped by these keys, so that a filter on call_id, user_id or period is applied to the events.
CREATE VIEW calls AS
SELECT
    call_id,
    user_id,
    period,
    arg_max(task_type, seq) AS task_type,
    arg_max(stream, seq) AS stream,
    arg_max(plan, seq) AS plan,
    arg_max(campaign_id, seq) AS campaign_id,
    arg_max(CASE type
        WHEN 'budget-reserved' THEN 'open'
        WHEN 'budget-denied' THEN 'denied'
        WHEN 'cost-recorded' THEN CASE outcome WHEN 'taken_over' THEN 'closed' WHEN 'recorded' THEN 'done' ELSE outcome END
    END, seq) AS status,
    arg_max(reason, seq) FILTER (type IN ('budget-denied', 'cost-recorded')) AS reason,
    count(*) FILTER (kind = 'hold') AS holds,
    coalesce(sum(CASE type WHEN 'budget-reserved' THEN amount_usd WHEN 'cost-recorded' THEN -hold_usd END), 0)
        ::DECIMAL(18, 9) AS held_usd,
    coalesce(sum(amount_usd) FILTER (type IN ('cost-recorded', 'cost-adjusted')), 0)::DECIMAL(18, 9) AS cost_usd,
    coalesce(sum(amount_usd) FILTER (type = 'cost-adjusted'), 0)::DECIMAL(18, 9) AS adjusted_usd,
    coalesce(sum(assumed_usd), 0)::DECIMAL(18, 9) AS assumed_usd,
    coalesce(sum(overage_usd), 0)::DECIMAL(18, 9) AS overage_usd,
    arg_max(basis, seq) AS basis,
    arg_max(model, seq) AS model,
    arg_max(model_used, seq) AS model_used,
    arg_max(generation_id, seq) AS generation_id,
    count(*) FILTER (type = 'model-called') AS attempts,
    count(*) FILTER (type = 'fallback-used') AS fallbacks,
    coalesce(sum(prompt_tokens) FILTER (type = 'model-called' OR outcome = 'recorded'), 0)::BIGINT AS prompt_tokens,
    coalesce(sum(completion_tokens) FILTER (type = 'model-called' OR outcome = 'recorded'), 0)::BIGINT
        AS completion_tokens,
    coalesce(sum(cached_tokens) FILTER (type = 'model-called' OR outcome = 'recorded'), 0)::BIGINT AS cached_tokens,
    coalesce(sum(cache_write_tokens) FILTER (type = 'model-called' OR outcome = 'recorded'), 0)::BIGINT
        AS cache_write_tokens,
    coalesce(sum(reasoning_tokens) FILTER (type = 'model-called' OR outcome = 'recorded'), 0)::BIGINT
        AS reasoning_tokens,
    coalesce(sum(latency_ms), 0)::BIGINT AS latency_ms,
    arg_max(worker, seq) AS worker,
    min(recorded_at) FILTER (type = 'budget-reserved') AS reserved_at,
    max(recorded_at) FILTER (type = 'cost-recorded') AS settled_at,
    partition,
    min(seq) AS first_seq,
    max(seq) AS last_seq
FROM events
WHERE type NOT IN ('plan-assigned', 'plan-cleared', 'credit-granted', 'credit-revoked', 'credit-expired', 'alert-raised', 'segment-sealed', 'ledger-recovered', 'policy-applied', 'budget-opened', 'key-created', 'key-revoked')
GROUP BY partition, call_id, user_id, period;

-- The policies in force, one after the other; version 0, the default policy, is in force before the first. A view, since
-- there are few.
CREATE VIEW policies AS
SELECT
    partition,
    (payload->>'version')::INTEGER AS version,
    payload->>'digest' AS digest,
    payload->'content' AS content,
    coalesce(payload->'definitions', '{}'::JSON) AS definitions,
    author,
    reason,
    recorded_at AS at,
    id,
    seq
FROM events
WHERE type = 'policy-applied';

-- Alerts of budgets, as the gate raised them. A view, since there are few.
CREATE VIEW alerts AS
SELECT
    recorded_at AS raised_at,
    budget,
    split_part(budget, ':', 1) AS name,
    array_to_string(string_split(budget, ':')[2:-2], ':') AS "value",
    split_part(budget, ':', -1) AS "window",
    (payload->>'fraction')::DECIMAL(9, 4) AS fraction,
    cap_usd,
    usd((payload->>'settled_nanousd')::BIGINT) AS settled_usd,
    payload->>'cause' AS call_id,
    partition,
    id,
    seq
FROM events
WHERE type = 'alert-raised';

-- Credits of budgets that are never reset: what was granted, and what of it was taken back or has expired. A user's
-- credit of a billing period is not here, but in `spend`. A view, since there are few.
CREATE VIEW credits AS
SELECT
    budget,
    split_part(budget, ':', 1) AS name,
    array_to_string(string_split(budget, ':')[2:-2], ':') AS "value",
    payload->>'credit' AS credit,
    sum(amount_usd) FILTER (type = 'credit-granted')::DECIMAL(18, 9) AS granted_usd,
    coalesce(-sum(amount_usd) FILTER (type = 'credit-revoked'), 0)::DECIMAL(18, 9) AS revoked_usd,
    coalesce(-sum(amount_usd) FILTER (type = 'credit-expired'), 0)::DECIMAL(18, 9) AS expired_usd,
    min(recorded_at) FILTER (type = 'credit-granted') AS granted_at,
    make_timestamptz(1000 * max((payload->>'expires_ms')::BIGINT) FILTER (type = 'credit-granted')) AS expires_at,
    min(recorded_at) FILTER (type = 'credit-expired') AS expired_at,
    arg_max(cap_usd, seq) AS cap_usd,
    arg_max(author, seq) FILTER (type = 'credit-granted') AS author,
    arg_max(reason, seq) FILTER (type = 'credit-granted') AS reason,
    partition,
    min(seq) AS first_seq
FROM events
WHERE type IN ('credit-granted', 'credit-revoked', 'credit-expired') AND budget IS NOT NULL
GROUP BY partition, budget, credit;

-- Keys of the HTTP gateway: what each is bound to, and its end. Of several revocations the earliest moment counts. A
-- view, since there are few.
CREATE VIEW api_keys AS
WITH created AS (
    SELECT payload->>'key_id' AS key_id, payload->>'replaces' AS replaces, payload, author, recorded_at, partition, seq
    FROM events
    WHERE type = 'key-created'
),
revoked AS (
    SELECT
        payload->>'key_id' AS key_id,
        make_timestamptz(1000 * min((payload->>'at_ms')::BIGINT)) AS revoked_at,
        arg_min(author, (payload->>'at_ms')::BIGINT) AS revoked_by,
        max(seq) AS last_seq
    FROM events
    WHERE type = 'key-revoked'
    GROUP BY ALL
),
replaced AS (
    SELECT replaces AS key_id, arg_max(key_id, seq) AS replaced_by, max(seq) AS last_seq
    FROM created
    WHERE replaces IS NOT NULL
    GROUP BY ALL
)
SELECT
    c.key_id,
    payload->>'name' AS name,
    payload->>'user_id' AS user_id,
    payload->>'plan' AS plan,
    payload->>'campaign_id' AS campaign_id,
    coalesce(payload->'tags', '{}'::JSON) AS tags,
    coalesce(from_json(payload->'models', '["VARCHAR"]'), []) AS models,
    coalesce(from_json(payload->'streams', '["VARCHAR"]'), []) AS streams,
    coalesce(from_json(payload->'allows', '["VARCHAR"]'), []) AS allows,
    coalesce((payload->'is_admin')::BOOLEAN, false) AS is_admin,
    recorded_at AS created_at,
    author AS created_by,
    make_timestamptz(1000 * (payload->>'expires_ms')::BIGINT) AS expires_at,
    r.revoked_at,
    r.revoked_by,
    n.replaced_by,
    c.partition,
    greatest(c.seq, r.last_seq, n.last_seq) AS last_seq
FROM created AS c
LEFT JOIN revoked AS r ON r.key_id = c.key_id
LEFT JOIN replaced AS n ON n.key_id = c.key_id;

-- Every budget with what it may spend and what it has left: the further ones too, and prepaid ones that nobody has used
-- yet. `cap_usd` is the cap at the last hold; of a budget with credit, that without its credit then, and its credit now.
CREATE VIEW budget_use AS
WITH credited AS (
    SELECT budget, partition, sum(amount_usd) AS credit_usd, max(seq) AS last_seq
    FROM events
    WHERE type IN ('credit-granted', 'credit-revoked', 'credit-expired') AND budget IS NOT NULL
    GROUP BY budget, partition
),
base AS (
    SELECT budget, usd(arg_max((payload->>'cap_nanousd')::BIGINT, seq)) AS cap_usd
    FROM events
    WHERE type IN ('credit-granted', 'credit-revoked', 'credit-expired') AND budget IS NOT NULL
    GROUP BY budget
)
SELECT
    budget,
    split_part(budget, ':', 1) AS name,
    array_to_string(string_split(budget, ':')[2:-2], ':') AS "value",
    split_part(budget, ':', -1) AS "window",
    (CASE WHEN c.budget IS NULL THEN b.cap_usd ELSE least(base.cap_usd + c.credit_usd, 1000000) END)::DECIMAL(18, 9)
        AS cap_usd,
    coalesce(c.credit_usd, 0)::DECIMAL(18, 9) AS credit_usd,
    coalesce(b.settled_usd, 0)::DECIMAL(18, 9) AS spent_usd,
    coalesce(b.held_usd, 0)::DECIMAL(18, 9) AS reserved_usd,
    coalesce(b.partition, c.partition) AS partition,
    greatest(b.last_seq, c.last_seq) AS last_seq
FROM budgets AS b
FULL JOIN credited AS c USING (budget)
LEFT JOIN base USING (budget);

-- What `spend` counts beside the balance in `budgets`. `base_cap_usd` is the cap in force without credit.
CREATE TABLE counters (
    budget VARCHAR PRIMARY KEY,
    user_id VARCHAR NOT NULL,
    period VARCHAR NOT NULL,
    plan VARCHAR,
    base_cap_usd DECIMAL(18, 9),
    credit_usd DECIMAL(18, 9) NOT NULL,
    calls BIGINT NOT NULL,
    denied BIGINT NOT NULL,
    fallbacks BIGINT NOT NULL,
    attempts BIGINT NOT NULL,
    adjusted_usd DECIMAL(18, 9) NOT NULL,
    assumed_usd DECIMAL(18, 9) NOT NULL,
    overage_usd DECIMAL(18, 9) NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    cache_write_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL,
    first_at TIMESTAMPTZ NOT NULL,
    last_at TIMESTAMPTZ NOT NULL,
    last_seq BIGINT NOT NULL
);

CREATE VIEW spend AS
SELECT
    c.user_id,
    c.period,
    c.plan,
    least(c.base_cap_usd + c.credit_usd, 1000000)::DECIMAL(18, 9) AS cap_usd,
    c.credit_usd,
    coalesce(b.settled_usd, 0)::DECIMAL(18, 9) AS spent_usd,
    coalesce(b.held_usd, 0)::DECIMAL(18, 9) AS reserved_usd,
    c.calls,
    c.denied,
    c.fallbacks,
    c.attempts,
    c.adjusted_usd,
    c.assumed_usd,
    c.overage_usd,
    c.prompt_tokens,
    c.completion_tokens,
    c.cached_tokens,
    c.cache_write_tokens,
    c.reasoning_tokens,
    c.first_at,
    c.last_at,
    c.last_seq
FROM counters AS c
LEFT JOIN budgets AS b ON b.budget = c.budget;

CREATE TABLE position (
    partition INTEGER PRIMARY KEY,
    ledger_id VARCHAR NOT NULL,
    id VARCHAR NOT NULL,
    seq BIGINT NOT NULL,
    events BIGINT NOT NULL,
    budgets BIGINT NOT NULL,
    schema_version INTEGER NOT NULL,
    duckdb_version VARCHAR NOT NULL
);

-- What `events` was when it was folded. `hash` may differ between versions of DuckDB, so `position` says which made it.
CREATE TABLE checksums (
    partition INTEGER NOT NULL,
    block BIGINT NOT NULL,
    events BIGINT NOT NULL,
    checksum HUGEINT NOT NULL
);

CREATE TABLE discrepancies (
    partition INTEGER NOT NULL,
    seq BIGINT NOT NULL,
    id VARCHAR NOT NULL,
    budget VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    stamped_usd DECIMAL(18, 9),
    recomputed_usd DECIMAL(18, 9) NOT NULL
);
