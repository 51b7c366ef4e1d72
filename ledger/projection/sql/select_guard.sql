-- Whether a statement written by a person only reads the projection.
--
-- The statement is parsed, not matched as text: json_serialize_sql accepts only SELECT. A SELECT can still
-- call functions that read files, and a table name can be that of a file, so every function must be on the list and
-- every table a plain name. Anything that fails or is NULL is refused. It runs on a connection of its own, without data.
CREATE TABLE allowed AS
SELECT DISTINCT function_name AS name
FROM duckdb_functions()
WHERE function_type IN ('scalar', 'aggregate', 'macro')
    AND NOT coalesce(has_side_effects, false)
    AND NOT regexp_matches(function_name, '^(getenv|current_setting|nextval|currval|pg_|write_|__)')
    AND function_name NOT IN (
        SELECT function_name FROM duckdb_functions() WHERE function_type NOT IN ('scalar', 'aggregate', 'macro')
    )
UNION
SELECT unnest([
    'usd', 'nanousd',
    'unnest', 'range', 'generate_series', 'repeat', 'histogram', 'row_number', 'rank', 'dense_rank', 'rank_dense',
    'percent_rank', 'cume_dist', 'ntile', 'lag', 'lead', 'first_value', 'last_value', 'nth_value', 'fill',
    'duckdb_tables', 'duckdb_columns', 'duckdb_views'
]);

CREATE MACRO refusal(query) AS (
    SELECT CASE
        WHEN (tree->>'$.error')::BOOLEAN IS DISTINCT FROM false
            THEN CASE WHEN tree->>'$.error_type' = 'parser' THEN tree->>'$.error_message' ELSE 'it is no SELECT' END
        WHEN json_array_length(tree, '$.statements') = 0 THEN 'it is empty'
        WHEN json_array_length(tree, '$.statements') IS DISTINCT FROM 1 THEN 'it is more than one statement'
        -- DuckDB 2 has WITH ... AS (DELETE ...), and serializes it as part of a SELECT.
        WHEN len(list_filter(
            tree->>'$..type',
            lambda t: ends_with(t, '_NODE')
                AND t NOT IN ('SELECT_NODE', 'SET_OPERATION_NODE', 'RECURSIVE_CTE_NODE', 'CTE_NODE')
        )) IS DISTINCT FROM 0 THEN 'it is no SELECT'
        WHEN len(list_filter(tree->>'$..catalog_name', lambda c: c NOT IN ('', 'main'))) IS DISTINCT FROM 0
            THEN 'it names another database'
        WHEN len(list_filter(tree->>'$..schema_name', lambda s: s NOT IN ('', 'main', 'information_schema')))
            IS DISTINCT FROM 0 THEN 'it names another schema'
        WHEN len(list_filter(tree->>'$..table_name', lambda t: NOT regexp_full_match(t, '"?\w*"?'))) IS DISTINCT FROM 0
            THEN 'it names a file as a table'
        ELSE (
            SELECT 'it calls ' || min(name) || '()'
            FROM (SELECT unnest(tree->>'$..function_name') AS name)
            WHERE name NOT IN (SELECT name FROM allowed)
        )
    END
    FROM (SELECT json_serialize_sql(query::VARCHAR)::JSON AS tree)
);
