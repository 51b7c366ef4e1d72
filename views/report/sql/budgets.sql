-- Budgets beside the users' billing periods that the calls of the selection were held against, the fullest first; where
-- nothing is selected, also those that nobody has used yet.
WITH used AS (
    SELECT budget, count(*) AS calls
    FROM report_budgets
    SEMI JOIN chosen_calls($period, $plan, $user, $campaign) USING (call_no)
    GROUP BY budget
)
SELECT
    name AS budget,
    "value",
    "window",
    coalesce(calls, 0) AS calls,
    spent_usd,
    reserved_usd,
    cap_usd,
    credit_usd,
    (100 * spent_usd::DOUBLE / nullif(cap_usd, 0)::DOUBLE)::DECIMAL(38, 2) AS used_percent
FROM budget_use
LEFT JOIN used USING (budget)
WHERE name <> 'user' AND (calls IS NOT NULL OR coalesce($period, $plan, $user, $campaign) IS NULL)
ORDER BY used_percent DESC NULLS LAST, spent_usd DESC, name, "value", "window"
