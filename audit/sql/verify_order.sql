-- The first event of a table that does not continue the partition, by its number, its id or its time columns.
WITH numbered AS (
    SELECT *, row_number() OVER () AS row
    FROM incoming
),
linked AS (
    SELECT *, lag(ms, 1, $ms) OVER in_order AS ms_before, lag(n, 1, $n) OVER in_order AS n_before
    FROM numbered
    WINDOW in_order AS (ORDER BY row)
)
SELECT $seq + row AS expected, id,
    CASE
        WHEN seq <> $seq + row THEN format('event {} is missing here, or one was added before it', $seq + row)
        WHEN id <> ms || '-' || n THEN 'its time columns are not its id''s'
        WHEN partition <> $partition THEN format('is of partition {}', partition)
        ELSE 'its id is not after the one before it'
    END AS problem
FROM linked
WHERE seq <> $seq + row OR id <> ms || '-' || n OR partition <> $partition
    OR ms < ms_before OR (ms = ms_before AND n <= n_before)
ORDER BY row
LIMIT 1;
