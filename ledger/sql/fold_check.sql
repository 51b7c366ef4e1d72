-- What must hold before anything is folded: a batch continues the ledger without gap or repeat, and every
-- event has the members its type cannot do without. `unreadable` is the first that has not.
SELECT
    count(*) AS events,
    min(seq) AS first_seq,
    max(seq) AS last_seq,
    count(DISTINCT seq) AS distinct_seqs,
    arg_max(id, seq) AS last_id,
    arg_min(id, seq) FILTER (NOT coalesce(CASE type
        WHEN 'budget-reserved' THEN task_type IS NOT NULL AND plan IS NOT NULL AND cap_nanousd IS NOT NULL
        WHEN 'model-called' THEN outcome IS NOT NULL AND charge_nanousd IS NOT NULL AND latency_ms IS NOT NULL
        WHEN 'fallback-used' THEN to_model IS NOT NULL AND reason IS NOT NULL
        WHEN 'cost-recorded' THEN basis IS NOT NULL AND outcome IS NOT NULL
        WHEN 'budget-denied' THEN budget IS NOT NULL AND cap_nanousd IS NOT NULL AND reason IS NOT NULL
        WHEN 'cost-adjusted' THEN basis IS NOT NULL AND reason IS NOT NULL
        WHEN 'plan-assigned' THEN plan IS NOT NULL AND cap_nanousd IS NOT NULL
        WHEN 'credit-granted' THEN author IS NOT NULL
        WHEN 'segment-sealed' THEN segment IS NOT NULL
    END, false)) AS unreadable
FROM batch;
