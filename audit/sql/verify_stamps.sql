-- The balances that the gate stamped and the recomputed ones: the first that differs for each budget, since all later
-- ones follow from it.
SELECT partition, min(seq) AS seq, arg_min(id, seq) AS id, budget,
    format('committed is stamped {} nano-dollars, the events give {} ({} stamps of this budget differ)',
        coalesce(nanousd(arg_min(coalesce(stamped_usd, -1), seq))::VARCHAR, '-'),
        nanousd(arg_min(recomputed_usd, seq)), count(*)) AS problem
FROM discrepancies
WHERE kind = 'committed' -- audits G6
GROUP BY partition, budget
ORDER BY partition, seq;
