-- What a verification keeps beside the projection that it folds: each move of a budget, and each hold or refusal with
-- the cap that the gate stamped.
CREATE TABLE verify_moves (
    partition INTEGER NOT NULL,
    seq BIGINT NOT NULL,
    budget VARCHAR NOT NULL,
    settled BIGINT NOT NULL,
    held BIGINT NOT NULL
);

CREATE TABLE verify_reserved (
    partition INTEGER NOT NULL,
    seq BIGINT NOT NULL,
    id VARCHAR NOT NULL,
    user_id VARCHAR NOT NULL,
    period VARCHAR NOT NULL,
    plan VARCHAR,
    budget VARCHAR NOT NULL,
    is_own BOOLEAN NOT NULL,
    stamped BIGINT NOT NULL,
    committed BIGINT
);

-- Caps by each policy: of "user:<id>", "plan:<name>", or a further budget, for all values or for one.
CREATE TABLE verify_policy_caps (
    partition INTEGER NOT NULL,
    seq BIGINT NOT NULL,
    version INTEGER NOT NULL,
    subject VARCHAR NOT NULL,
    cap BIGINT NOT NULL
);

-- The kind of window of each budget by each policy, by its name in keys; and the windows in which something was held.
CREATE TABLE verify_kinds (
    partition INTEGER NOT NULL,
    policy_seq BIGINT NOT NULL,
    name VARCHAR NOT NULL,
    kind VARCHAR NOT NULL
);

CREATE TABLE verify_windows (
    partition INTEGER NOT NULL,
    policy_seq BIGINT NOT NULL,
    kind VARCHAR NOT NULL,
    label VARCHAR NOT NULL,
    start_ms BIGINT NOT NULL,
    end_ms BIGINT NOT NULL
);

-- Caps by the settings: of "user:<id>", "plan:<name>", "day" or "campaign".
CREATE TABLE verify_known_caps (
    subject VARCHAR NOT NULL,
    cap BIGINT NOT NULL
);
