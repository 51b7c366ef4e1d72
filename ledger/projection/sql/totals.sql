-- What the events after a position add to the totals of a partition: one row for each group of the metrics.
-- projection/totals.py puts in the latency classes. `reason` is free text for a failed call; it is used here only for
-- types whose reasons are a fixed list. A doubted usage has no column, and is looked for in the payload.
SELECT
    type,
    coalesce(CASE type WHEN 'model-called' THEN model WHEN 'fallback-used' THEN from_model END, '') AS model,
    coalesce(outcome, '') AS outcome,
    coalesce(CASE WHEN type IN ('cost-recorded', 'cost-adjusted') THEN basis END, '') AS basis,
    coalesce(CASE WHEN type IN ('budget-denied', 'fallback-used', 'model-called') THEN reason END, '') AS reason,
    type = 'model-called' AND json_exists(payload, '/usage_doubt') AS is_doubted,
    coalesce(CASE WHEN type = 'model-called' THEN http_status END, 0) AS http_status,
    coalesce(kind, '') AS kind,
    -- Only the name in the policy: the number of values has no limit.
    coalesce(CASE WHEN type IN ('budget-denied', 'alert-raised') THEN regexp_extract(budget, '^[^:~]*') END, '') AS budget,
    type = 'cost-recorded' AND hold > 0 AS frees_hold,
    max(seq) AS seq,
    count(*) AS events,
    coalesce(sum(amount_usd) FILTER (amount_usd > 0), 0)::DECIMAL(38, 9) AS usd,
    coalesce(-sum(amount_usd) FILTER (amount_usd < 0), 0)::DECIMAL(38, 9) AS less_usd,
    coalesce(sum(hold_usd), 0)::DECIMAL(38, 9) AS freed_usd,
    coalesce(sum(assumed_usd), 0)::DECIMAL(38, 9) AS assumed_usd,
    coalesce(sum(overage_usd), 0)::DECIMAL(38, 9) AS overage_usd,
    coalesce(sum(charge_usd), 0)::DECIMAL(38, 9) AS charge_usd,
    coalesce(sum(CASE WHEN type = 'model-called' THEN prompt_tokens END), 0)::BIGINT AS prompt_tokens,
    coalesce(sum(CASE WHEN type = 'model-called' THEN completion_tokens END), 0)::BIGINT AS completion_tokens,
    coalesce(sum(latency_ms), 0)::BIGINT AS latency_ms,
    $buckets
FROM events
WHERE partition = ? AND seq > ?
GROUP BY ALL
