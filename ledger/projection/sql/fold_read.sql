-- How payloads are read: their members as typed columns. Amounts stay nano-dollars here. A plan that the ledger
-- assigned overrides the task's. A view, since storing the result costs more than reading it again.
CREATE OR REPLACE TEMP VIEW batch AS
SELECT
    * EXCLUDE (assigned_plan) REPLACE (coalesce(assigned_plan, plan) AS plan),
    -- Whether it has the members that its type requires, and numbers that its type can have.
    coalesce(CASE type
        WHEN 'budget-reserved' THEN task_type IS NOT NULL AND coalesce(assigned_plan, plan) IS NOT NULL
            AND cap_nanousd >= 0 AND amount >= 0
        WHEN 'model-called' THEN outcome IS NOT NULL AND charge_nanousd >= 0 AND latency_ms >= 0 AND amount = 0
        WHEN 'fallback-used' THEN to_model IS NOT NULL AND reason IS NOT NULL AND amount = 0
        WHEN 'cost-recorded' THEN basis IS NOT NULL AND outcome IS NOT NULL
            AND least(amount, coalesce(hold_nanousd, 0), coalesce(assumed_nanousd, 0), coalesce(overage_nanousd, 0)) >= 0
        WHEN 'budget-denied' THEN budget IS NOT NULL AND cap_nanousd >= 0 AND reason IS NOT NULL AND amount >= 0
        WHEN 'cost-adjusted' THEN basis IS NOT NULL AND reason IS NOT NULL
        WHEN 'plan-assigned' THEN coalesce(assigned_plan, plan) IS NOT NULL AND cap_nanousd >= 0 AND amount = 0
        WHEN 'plan-cleared' THEN author IS NOT NULL AND amount = 0
        WHEN 'credit-granted' THEN author IS NOT NULL AND amount >= 0
        WHEN 'credit-revoked' THEN author IS NOT NULL AND amount <= 0
        WHEN 'credit-expired' THEN budget IS NOT NULL AND amount <= 0
        WHEN 'alert-raised' THEN budget IS NOT NULL AND cap_nanousd >= 0 AND amount = 0
            AND TRY_CAST(payload->>'fraction' AS DECIMAL(9, 4)) > 0 AND TRY_CAST(payload->>'settled_nanousd' AS BIGINT) IS NOT NULL
        WHEN 'segment-sealed' THEN segment IS NOT NULL AND amount = 0
        WHEN 'ledger-recovered' THEN author IS NOT NULL AND amount = 0
        -- Read separately, since they are rare: each member that is read here costs time with every event.
        WHEN 'policy-applied' THEN author IS NOT NULL AND amount = 0 AND (payload->>'digest') IS NOT NULL
            AND TRY_CAST(payload->>'version' AS INTEGER) >= 1 AND json_type(payload, '$.content') = 'OBJECT'
        WHEN 'budget-opened' THEN len(budgets) = 1 AND amount >= 0
            AND TRY_CAST(payload->>'policy_version' AS INTEGER) >= 1
        WHEN 'key-created' THEN author IS NOT NULL AND amount = 0 AND (payload->>'key_id') IS NOT NULL
            AND length(payload->>'hash') = 64
        WHEN 'key-revoked' THEN author IS NOT NULL AND amount = 0 AND (payload->>'key_id') IS NOT NULL
            AND TRY_CAST(payload->>'at_ms' AS BIGINT) >= 0
    END, false) AS is_readable
FROM (
    SELECT
        partition,
        seq,
        id,
        make_timestamptz(ms * 1000) AS recorded_at,
        type,
        v,
        user_id,
        period,
        call_id,
        attempt::INTEGER AS attempt,
        amount,
        committed,
        payload,
        unnest(json_transform(payload, '{
            "kind": "VARCHAR", "hold": "INTEGER", "hold_nanousd": "BIGINT", "cap_nanousd": "BIGINT", "budget": "VARCHAR",
            "budgets": [{"budget": "VARCHAR", "cap_nanousd": "BIGINT", "committed_nanousd": "BIGINT"}],
            "task_type": "VARCHAR", "stream": "VARCHAR", "plan": "VARCHAR", "assigned_plan": "VARCHAR", "campaign_id": "VARCHAR", "worker": "VARCHAR",
            "bound": {"model": "VARCHAR"}, "model": "VARCHAR", "to_model": "VARCHAR", "from_model": "VARCHAR",
            "model_used": "VARCHAR", "outcome": "VARCHAR", "basis": "VARCHAR", "charge_basis": "VARCHAR",
            "reason": "VARCHAR", "http_status": "INTEGER", "error": "VARCHAR", "latency_ms": "BIGINT",
            "usage": {"prompt_tokens": "BIGINT", "completion_tokens": "BIGINT", "cached_tokens": "BIGINT",
                "cache_write_tokens": "BIGINT",
                "reasoning_tokens": "BIGINT"},
            "generation_id": "VARCHAR", "finish_reason": "VARCHAR", "charge_nanousd": "BIGINT",
            "assumed_nanousd": "BIGINT", "overage_nanousd": "BIGINT", "author": "VARCHAR", "segment": "VARCHAR"
        }'))
    FROM incoming
);
