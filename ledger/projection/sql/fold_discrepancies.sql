-- The gate's stamp and the sum made here must agree; and at every hold of money, the sum must be within the cap (a call
-- that costs nothing is held at a used-up cap too, and a policy may open a budget in which more is spent and held).
INSERT INTO discrepancies
SELECT $partition, d.seq, e.id, d.budget, d.kind, d.stamped, d.recomputed
FROM (
    SELECT seq, budget, 'committed' AS kind, stamped, recomputed
    FROM moves
    WHERE stamped <> recomputed OR (is_move AND stamped IS NULL) -- audits G6 G8
    UNION ALL
    SELECT seq, budget, 'cap', cap, recomputed
    FROM moves
    WHERE recomputed > cap AND held > 0 -- audits G1
) AS d
JOIN events AS e ON e.partition = $partition AND e.seq BETWEEN $first AND $last AND e.seq = d.seq
WHERE d.kind <> 'cap' OR e.type = 'budget-reserved';
