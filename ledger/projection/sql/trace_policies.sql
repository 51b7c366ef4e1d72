-- Policies of the batch, each with the version before it.
SELECT
    p.seq, p.id, p.version, p.digest,
    coalesce((SELECT max(b.version) FROM policies AS b WHERE b.partition = p.partition AND b.seq < p.seq), 0) AS before
FROM policies AS p
SEMI JOIN (SELECT partition, seq FROM incoming WHERE type = 'policy-applied') AS i ON i.partition = p.partition AND i.seq = p.seq
ORDER BY p.seq;
