-- The first event after the watermark whose stamps the gate cannot have written.
SELECT d.seq, d.id, d.budget, d.kind, nanousd(d.stamped_usd) AS stamped, nanousd(d.recomputed_usd) AS recomputed
FROM discrepancies AS d
JOIN incoming AS i ON i.seq = d.seq
WHERE d.partition = $partition AND d.seq BETWEEN $first AND $last AND (i.ms, i.n) > ($ms, $n)
ORDER BY d.seq, d.kind
LIMIT 1;
