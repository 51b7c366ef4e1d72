-- Every hold is within its cap, and the stamped cap is the one in force: by the policy, the assigned plan and credit.
SELECT partition, seq, id, budget,
    CASE
        WHEN cap IS NULL THEN format('policy {} has no plan {}', policy_version, plan)
        WHEN committed > cap THEN format('{} nano-dollars are committed, the cap in force is {}', committed, cap)
            || coalesce(format(' by policy {}', policy_version), '')
        WHEN stamped <> cap THEN format('the cap is stamped {} nano-dollars, the one in force is {}', stamped, cap)
            || coalesce(format(' by policy {}', policy_version), '')
        ELSE format('the cap is stamped {} nano-dollars, less than the credit granted', stamped)
    END AS problem
FROM verify_caps
WHERE cap IS NULL OR committed > cap OR stamped <> cap OR stamped < credit -- audits G1 G11
ORDER BY partition, seq;
