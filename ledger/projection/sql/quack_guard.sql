-- What another process may ask through Quack: the baselines of a budget check, and nothing else.
--
-- A heavy query here would hold up budget checks and the fold, and Quack 1.5 can neither cut a query off nor limit its
-- memory. So a statement must be the one that ledger/store.py makes, with any budgets' names in it; whatever else comes
-- is refused, by NULL. Of that Quack tells no reason, so another SELECT is replaced by an error that says where to ask.
-- The guard lives in a database of its own, beside the projection.
ATTACH ':memory:' AS quack_guard;

CREATE TABLE quack_guard.main.answered (head VARCHAR, tail VARCHAR);

CREATE MACRO quack_guard.main.only_baselines(session_id, query) AS (
    SELECT CASE
        WHEN length(query) <= 1000000
            AND starts_with(query, head)
            AND ends_with(query, tail)
            AND regexp_full_match(
                query[length(head) + 1 : length(query) - length(tail)], '(?s)NULL|''(?:[^'']|'''')*''(?:, ''(?:[^'']|'''')*'')*'
            )
            THEN query
        -- What ATTACH itself asks (Quack 1.5.5): names of schemas, tables and views.
        WHEN trim(regexp_replace(query, '\s+', ' ', 'g')) IN (
            'SELECT catalog_name, schema_name FROM information_schema.schemata '
                || 'WHERE catalog_name NOT IN (''system'', ''temp'') ORDER BY ALL',
            'SELECT schema_name, sql, ''table'' FROM duckdb_tables() '
                || 'UNION ALL SELECT schema_name, view_name, ''view'' FROM duckdb_views()'
        )
            THEN query
        -- Only of a query does Quack run what comes back. Of an append, which comes here as an INSERT, anything but
        -- NULL lets it pass.
        WHEN regexp_matches(query, '^(?i)\s*(SELECT|FROM|WITH|DESCRIBE|SHOW)\b')
            THEN 'SELECT error(''the projector answers budget checks only: ask with tollbook sql'')'
    END
    FROM quack_guard.main.answered
);

SET GLOBAL quack_authorization_function = 'quack_guard.main.only_baselines';

-- Names of Python variables are not tables here, and files are out of reach for whatever the guard overlooks.
SET GLOBAL python_enable_replacements = false;
SET GLOBAL enable_external_access = false;
