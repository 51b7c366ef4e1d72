-- G1 at every hold, and the stamped cap against the one in force.
SELECT partition, seq, id,
    CASE
        WHEN committed > cap THEN format('{}: {} nano-dollars are committed, the cap in force is {}', budget, committed, cap)
        WHEN stamped <> cap THEN format('{}: the cap is stamped {} nano-dollars, the one in force is {}', budget, stamped, cap)
        ELSE format('{}: the cap is stamped {} nano-dollars, less than the credit granted', budget, stamped)
    END AS problem
FROM verify_caps
WHERE committed > cap OR stamped <> cap OR stamped < credit
ORDER BY partition, seq;
