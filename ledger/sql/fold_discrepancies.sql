-- Two computations that must agree: the gate's stamp and the sum made here; and G1 at every hold.
INSERT INTO discrepancies
SELECT b.partition, b.seq, b.id, d.budget, d.kind, usd(d.stamped), usd(d.recomputed)
FROM (
    SELECT seq, budget, 'committed' AS kind, stamped, recomputed
    FROM moves
    WHERE stamped <> recomputed OR (is_move AND stamped IS NULL)
    UNION ALL
    SELECT seq, budget, 'cap', cap, recomputed
    FROM moves
    WHERE recomputed > cap
) AS d
JOIN batch AS b ON b.seq = d.seq;
