-- What another process may ask through Quack: the baselines of a budget check, and nothing else.
--
-- A heavy query here would delay budget checks and the fold, and Quack 1.5 can neither interrupt a query nor limit its
-- memory. So a statement must be the one made by projection/store.py, with any budget names in it; everything else is
-- refused by NULL. Quack gives no reason for that, so another SELECT is replaced by an error that says where to ask.
-- The guard is in a database of its own, beside the projection.
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
        -- Quack runs what is returned for a query. An append arrives here as an INSERT, and any value but NULL would
        -- let it pass.
        WHEN regexp_matches(query, '^(?i)\s*(SELECT|FROM|WITH|DESCRIBE|SHOW)\b')
            THEN 'SELECT error(''the projector answers budget checks only: ask with tollbook sql'')'
    END
    FROM quack_guard.main.answered
);

SET GLOBAL quack_authorization_function = 'quack_guard.main.only_baselines';

-- Names of Python variables are not tables here; and if the guard overlooks something, it still reaches no file.
SET GLOBAL python_enable_replacements = false;
SET GLOBAL enable_external_access = false;
