-- What the batch adds to the checksum of each block of events. A sum, since it does not depend on where batches end.
CREATE OR REPLACE TEMP TABLE sums_of_blocks AS
SELECT e.partition, (e.seq - 1) // 65536 AS block, count(*) AS events, sum(hash(e)::HUGEINT) AS checksum
FROM events AS e
WHERE e.partition = $partition AND e.seq BETWEEN $first AND $last
GROUP BY ALL;
