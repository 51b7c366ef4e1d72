-- Blocks of events that differ from what was folded, and positions that are not the end of their partition's events.
WITH found AS (
    SELECT e.partition, (e.seq - 1) // 65536 AS block, count(*) AS events, sum(hash(e)::HUGEINT) AS checksum
    FROM events AS e
    GROUP BY ALL
),
ends AS (
    SELECT partition, max(seq) AS seq, arg_max(id, seq) AS id, count(*) AS events
    FROM events
    GROUP BY partition
)
SELECT format('events {} to {} of partition {} are not those that were folded',
    65536 * block + 1, 65536 * block + greatest(f.events, c.events, 1), partition) AS problem
FROM found AS f
FULL JOIN checksums AS c USING (partition, block)
WHERE f.events IS DISTINCT FROM c.events OR f.checksum IS DISTINCT FROM c.checksum -- G8
UNION ALL
SELECT format('partition {} is folded up to event {} ({}) by the position, up to event {} ({}) by the events',
    partition, coalesce(p.seq, 0), coalesce(p.id, '0-0'), coalesce(e.seq, 0), coalesce(e.id, '0-0'))
FROM position AS p
FULL JOIN ends AS e USING (partition)
WHERE coalesce(p.seq, 0) <> coalesce(e.seq, 0) OR coalesce(p.id, '0-0') <> coalesce(e.id, '0-0')
    OR coalesce(p.events, 0) <> coalesce(e.events, 0); -- G8
