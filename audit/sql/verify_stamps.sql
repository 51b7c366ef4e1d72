-- Balances as stamped against recomputed ones: of each budget the first that differs, since all later ones follow it.
SELECT partition, min(seq) AS seq, arg_min(id, seq) AS id,
    format('{}: committed is stamped {} nano-dollars, the events give {} ({} stamps of this budget differ)',
        budget, coalesce(nanousd(arg_min(coalesce(stamped_usd, -1), seq))::VARCHAR, '-'),
        nanousd(arg_min(recomputed_usd, seq)), count(*)) AS problem
FROM discrepancies
WHERE kind = 'committed'
GROUP BY partition, budget
ORDER BY partition, seq;
