-- Events that the gate would not have appended, with the first rule that each one breaks.
SELECT partition, seq, id, NULL AS budget, problem
FROM (
    SELECT
        partition, seq, id,
        CASE
            WHEN user_id <> first_user THEN format('call {} is of user {}', call_id, first_user)
            WHEN is_over AND (is_single OR kind IS NOT NULL) -- audits G4
                THEN format('call {} was over before', call_id)
            WHEN is_single AND (opened > 0 AND type <> 'budget-denied' OR opened > closed)
                THEN format('call {} has holds', call_id)
            WHEN type = 'cost-recorded' AND is_single AND (hold <> 0 OR freed <> 0)
                THEN format('a charge without a hold frees {} of hold {}', freed, hold)
            WHEN is_single THEN NULL
            WHEN kind = 'hold' AND opened > closed
                THEN format('hold {} is opened while hold {} of call {} is open', hold, opened, call_id)
            WHEN kind = 'hold' AND hold <> opened + 1
                THEN format('hold {} of call {} follows hold {}', hold, call_id, opened)
            WHEN kind = 'hold' AND attempt <= attempts
                THEN format('attempt {} of call {} comes after attempt {}', attempt, call_id, attempts)
            WHEN kind = 'hold' THEN NULL
            WHEN type = 'cost-adjusted' AND settled_as IS NULL
                THEN format('hold {} of call {} is not settled', hold, call_id)
            WHEN hold = 0 AND type <> 'cost-adjusted'
                THEN format('names no hold of call {}', call_id)
            WHEN hold > 0 AND (hold_type <> 'budget-reserved' OR hold > opened)
                THEN format('call {} has no hold {}', call_id, hold)
            WHEN period <> hold_period
                THEN format('hold {} of call {} is of period {}', hold, call_id, hold_period)
            WHEN (kind = 'extension' OR type = 'cost-recorded') AND settled_as IS NOT NULL -- audits G2
                THEN format('hold {} of call {} is settled', hold, call_id)
            WHEN (kind = 'extension' OR type = 'cost-recorded') AND hold <> opened
                THEN format('hold {} of call {} is not the open one', hold, call_id)
            WHEN type IN ('model-called', 'fallback-used') AND settled_as = 'done'
                THEN format('an attempt of hold {} of call {}, which is done', hold, call_id)
            WHEN is_repeated -- audits G4
                THEN format('attempt {} of call {} is recorded twice', attempt, call_id)
            WHEN type = 'cost-recorded' AND freed <> held -- audits G2
                THEN format('frees {} nano-dollars, hold {} of call {} is {}', freed, hold, call_id, held)
            WHEN type = 'cost-recorded' AND overage <> greatest(amount - freed, 0)
                THEN format('says {} nano-dollars over the hold, it is {}', overage, greatest(amount - freed, 0))
            WHEN type = 'cost-recorded' AND basis = 'released' AND amount <> 0
                THEN format('releases a hold at {} nano-dollars', amount)
            WHEN type = 'cost-adjusted' AND cost < 0
                THEN format('makes the cost of hold {} of call {} negative', hold, call_id)
        END AS problem
    FROM verify_calls
)
WHERE problem IS NOT NULL
ORDER BY partition, seq;
