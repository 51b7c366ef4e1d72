-- Append the events themselves. Payloads are read only here; members that were left out because they have their
-- default value are written out.
INSERT INTO events BY NAME
SELECT
    partition,
    seq,
    id,
    recorded_at,
    type,
    v,
    user_id,
    period,
    call_id,
    attempt,
    usd(amount) AS amount_usd,
    usd(committed) AS committed_usd,
    CASE WHEN type = 'budget-reserved' THEN coalesce(kind, 'hold') END AS kind,
    CASE WHEN type IN ('plan-assigned', 'plan-cleared', 'credit-granted', 'credit-revoked', 'budget-denied', 'segment-sealed',
            'ledger-recovered', 'policy-applied', 'credit-expired', 'alert-raised', 'budget-opened', 'key-created', 'key-revoked') THEN hold
        ELSE coalesce(hold, 0) END AS hold,
    CASE type WHEN 'cost-recorded' THEN usd(coalesce(hold_nanousd, 0)) WHEN 'budget-opened' THEN usd(hold_nanousd) END AS hold_usd,
    usd(cap_nanousd) AS cap_usd,
    budget,
    task_type,
    stream,
    plan,
    campaign_id,
    worker,
    coalesce(model, to_model, bound.model) AS model,
    model_used,
    from_model,
    outcome,
    coalesce(basis, charge_basis) AS basis,
    reason,
    http_status,
    error,
    latency_ms,
    CASE WHEN usage IS NOT NULL THEN coalesce(usage.prompt_tokens, 0) END AS prompt_tokens,
    CASE WHEN usage IS NOT NULL THEN coalesce(usage.completion_tokens, 0) END AS completion_tokens,
    CASE WHEN usage IS NOT NULL THEN coalesce(usage.cached_tokens, 0) END AS cached_tokens,
    CASE WHEN usage IS NOT NULL THEN coalesce(usage.cache_write_tokens, 0) END AS cache_write_tokens,
    CASE WHEN usage IS NOT NULL THEN coalesce(usage.reasoning_tokens, 0) END AS reasoning_tokens,
    generation_id,
    finish_reason,
    usd(charge_nanousd) AS charge_usd,
    CASE WHEN type IN ('cost-recorded', 'cost-adjusted') THEN usd(coalesce(assumed_nanousd, 0)) END AS assumed_usd,
    CASE WHEN type = 'cost-recorded' THEN usd(coalesce(overage_nanousd, 0)) END AS overage_usd,
    author,
    CASE WHEN is_readable THEN payload ELSE error('unreadable') END AS payload
FROM batch
WHERE $user_id IS NULL OR user_id = $user_id
    -- Kept for one user's fold too: it shows which budgets are the user's own, and their opening balances. Openings of
    -- other budgets move nothing there.
    OR type IN ('policy-applied', 'budget-opened');
