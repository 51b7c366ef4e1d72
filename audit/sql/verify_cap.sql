-- Every hold is within its cap, and the stamped cap is the one in force.
SELECT partition, seq, id, budget,
    CASE
        WHEN committed > cap THEN format('{} nano-dollars are committed, the cap in force is {}', committed, cap)
        WHEN stamped <> cap THEN format('the cap is stamped {} nano-dollars, the one in force is {}', stamped, cap)
        ELSE format('the cap is stamped {} nano-dollars, less than the credit granted', stamped)
    END AS problem
FROM verify_caps
WHERE committed > cap OR stamped <> cap OR stamped < credit -- audits G1
ORDER BY partition, seq;
