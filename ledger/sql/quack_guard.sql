-- What another process may ask through Quack: SELECT statements over the projection, nothing else.
--
-- The statement is parsed, not matched as text: json_serialize_sql knows only SELECT. A SELECT can still
-- call functions that read files or stop the server, and a table name can be a file's, so every function must be
-- on the list and every table a plain name of this database. Appends come here as an INSERT and are refused with
-- the rest. Anything that fails or is NULL refuses. The guard lives in a database of its own, beside the projection.
ATTACH ':memory:' AS quack_guard;

CREATE TABLE quack_guard.main.allowed AS
SELECT DISTINCT function_name AS name
FROM duckdb_functions()
WHERE function_type IN ('scalar', 'aggregate', 'macro')
    AND NOT coalesce(has_side_effects, false)
    AND function_name NOT LIKE 'quack%'
    AND function_name NOT IN (
        SELECT function_name FROM duckdb_functions() WHERE function_type NOT IN ('scalar', 'aggregate', 'macro')
    )
UNION
SELECT unnest([
    'unnest', 'range', 'generate_series', 'repeat', 'histogram', 'row_number', 'rank', 'dense_rank', 'rank_dense',
    'percent_rank', 'cume_dist', 'ntile', 'lag', 'lead', 'first_value', 'last_value', 'nth_value', 'fill',
    'duckdb_tables', 'duckdb_columns', 'duckdb_views', 'duckdb_schemas', 'duckdb_databases', 'duckdb_types',
    'duckdb_constraints'
]);

CREATE MACRO quack_guard.main.is_read_only(session_id, query) AS (
    SELECT coalesce(
        NOT (tree->>'$.error')::BOOLEAN
        AND len(list_filter(tree->>'$..catalog_name', lambda c: c NOT IN ('', 'main'))) = 0
        AND len(list_filter(tree->>'$..schema_name', lambda s: s NOT IN ('', 'main', 'information_schema'))) = 0
        AND len(list_filter(tree->>'$..table_name', lambda t: NOT regexp_full_match(t, '"?\w*"?'))) = 0
        AND NOT EXISTS (
            SELECT 1
            FROM (SELECT unnest(tree->>'$..function_name') AS name)
            WHERE name NOT IN (SELECT name FROM quack_guard.main.allowed)
        ),
        false
    )
    FROM (SELECT json_serialize_sql(query::VARCHAR)::JSON AS tree)
);

SET GLOBAL quack_authorization_function = 'quack_guard.main.is_read_only';

-- Names of Python variables are not tables here, and files are out of reach for whatever the guard overlooks.
SET GLOBAL python_enable_replacements = false;
SET GLOBAL enable_external_access = false;
