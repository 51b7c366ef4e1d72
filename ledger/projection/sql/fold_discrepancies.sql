-- Two computations that must agree: the gate's stamp and the sum made here; and G1 at every hold.
INSERT INTO discrepancies
SELECT $partition, d.seq, e.id, d.budget, d.kind, d.stamped, d.recomputed
FROM (
    SELECT seq, budget, 'committed' AS kind, stamped, recomputed
    FROM moves
    WHERE stamped <> recomputed OR (is_move AND stamped IS NULL)
    UNION ALL
    SELECT seq, budget, 'cap', cap, recomputed
    FROM moves
    WHERE recomputed > cap
) AS d
JOIN events AS e ON e.partition = $partition AND e.seq BETWEEN $first AND $last AND e.seq = d.seq;
