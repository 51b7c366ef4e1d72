-- Holds that are not settled, by the events.
SELECT
    partition, call_id, any_value(user_id) AS user_id, any_value(period) AS period, hold,
    (sum(amount) FILTER (type = 'budget-reserved'))::BIGINT AS amount_nanousd, min(seq) AS seq, arg_min(id, seq) AS id
FROM verify_calls
WHERE hold > 0 AND hold_type = 'budget-reserved'
GROUP BY partition, call_id, life, hold
HAVING count(*) FILTER (type = 'cost-recorded') = 0
ORDER BY partition, seq;
