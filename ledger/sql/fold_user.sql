-- One user's share of the batch. Of further budgets, those that are the user's alone: a campaign's would lack
-- others' moves.
CREATE OR REPLACE TEMP TABLE batch AS
SELECT * REPLACE (list_filter(budgets, lambda b: NOT starts_with(b.budget, 'campaign:')) AS budgets)
FROM batch
WHERE user_id = $user_id;
