-- How attempts end, by model asked for, and how long answers take; percentiles are latencies that were measured.
SELECT
    coalesce(asked, 'not named') AS model,
    count(*) FILTER (type = 'model-called') AS attempts,
    count(*) FILTER (type = 'model-called' AND outcome <> 'ok') AS failed,
    count(*) FILTER (type = 'fallback-used') AS fallbacks,
    (100 * count(*) FILTER (type = 'fallback-used') / nullif(count(*) FILTER (type = 'model-called'), 0))
        ::DECIMAL(38, 2) AS fallback_percent,
    quantile_disc(latency_ms, 0.5) FILTER (outcome = 'ok') AS p50_ms,
    quantile_disc(latency_ms, 0.95) FILTER (outcome = 'ok') AS p95_ms,
    quantile_disc(latency_ms, 0.99) FILTER (outcome = 'ok') AS p99_ms,
    max(latency_ms) FILTER (outcome = 'ok') AS max_ms
FROM (
    SELECT type, outcome, latency_ms, CASE type WHEN 'fallback-used' THEN from_model ELSE model END AS asked
    FROM chosen_events($period, $plan, $user, $campaign)
    WHERE type IN ('model-called', 'fallback-used')
)
GROUP BY ALL
ORDER BY attempts DESC, model
