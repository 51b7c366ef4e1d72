-- The events from $first to $last that ledger_plan.sql drew, in the columns of a stream's batch. `segment-sealed` events
-- have no payload yet: only the sealing knows it.
WITH texts AS (
    SELECT
        *,
        if(step IN ('paid', 'alert'), '', 'user-' || user) AS user_id,
        CASE
            WHEN step NOT IN ('hold', 'hold2', 'extension', 'taken_over', 'done', 'over', 'failed', 'expired', 'charge',
                'correction', 'late') OR coalesce(day_committed, campaign_committed) IS NULL THEN ''
            ELSE '"budgets":[' || concat_ws(',',
                '{"budget":"day:user-' || user || ':' || strftime(make_timestamp(begun_ms * 1000), '%Y-%m-%d') || '",'
                    || if(step IN ('hold', 'hold2', 'extension'), '"cap_nanousd":400000000000,', '') || '"committed_nanousd":' || day_committed || '}',
                '{"budget":"campaign:campaign-' || campaign || ':' || period || '",'
                    || if(step IN ('hold', 'hold2', 'extension'), '"cap_nanousd":1000000000000000,', '') || '"committed_nanousd":' || campaign_committed || '}'
            ) || '],'
        END AS budgets,
        if(is_assigned, '"assigned_plan":"growth",', '') AS assigned,
        '"task_type":"' || ['generate_draft', 'score_post', 'classify_archetype', 'extract_patterns'][1 + call % 4]
            || '","stream":"generation","plan":"starter",' || if(campaign IS NULL, '', '"campaign_id":"campaign-' || campaign || '",')
            || '"worker":"host-4711-a1b2c3.' || call % 8 || '","bound":{"model":"anthropic/claude-sonnet-4","prompt_tokens":312,'
            || '"completion_tokens":2000,"prompt_nanousd_per_mtok":3000000000,"completion_nanousd_per_mtok":15000000000}}' AS task,
        ['http_error', 'provider_error', 'invalid_response', 'timeout', 'connection_error', 'not_sent'][1 + dice('bad', call) % 6] AS problem,
        if(attempt > 1, 'google/gemini-2.5-flash', 'anthropic/claude-sonnet-4') AS model
    FROM plan
    WHERE seq BETWEEN $first AND $last
)
SELECT
    0::INTEGER AS partition,
    ms || '-' || n AS id,
    ms::BIGINT AS ms,
    n::BIGINT AS n,
    seq::BIGINT AS seq,
    CASE WHEN step IN ('hold', 'hold2', 'extension') THEN 'budget-reserved' WHEN step IN ('ok', 'bad') THEN 'model-called'
        WHEN step = 'fallback' THEN 'fallback-used' WHEN step IN ('correction', 'late') THEN 'cost-adjusted'
        WHEN step = 'denied' THEN 'budget-denied' WHEN step = 'plan' THEN 'plan-assigned'
        WHEN step IN ('credit', 'paid') THEN 'credit-granted' WHEN step = 'alert' THEN 'alert-raised' ELSE 'cost-recorded' END AS type,
    2::INTEGER AS v,
    user_id,
    if(user_id = '', '', period) AS period,
    CASE step WHEN 'alert' THEN '' WHEN 'paid' THEN 'credit pay-' || call ELSE 'call-' || call END AS call_id,
    if(step IN ('plan', 'credit', 'charge', 'paid', 'alert'), 0, attempt)::INTEGER AS attempt,
    if(cost <> 0, cost, asked)::BIGINT AS amount,
    CASE WHEN step IN ('plan', 'credit') THEN nullif(settled + held, 0) WHEN user_id = '' THEN NULL
        ELSE settled + held END::BIGINT AS committed,
    '{' || CASE
        WHEN step IN ('hold', 'hold2') THEN '"hold":' || hold || ',"cap_nanousd":' || 400000000000 + credit || ',"deadline_ms":' || begun_ms + 600000
            || ',' || assigned || budgets || task
        WHEN step = 'extension' THEN '"hold":' || hold || ',"cap_nanousd":' || 400000000000 + credit || ',' || assigned || budgets
            || '"kind":"extension",' || task
        WHEN step = 'denied' THEN '"budget":"user:' || user_id || ':' || period || '","cap_nanousd":' || 400000000000 + credit
            || ',"settled_nanousd":' || settled || ',"held_nanousd":' || held || ',"reason":"'
            || if(call % 3 = 0, 'wait_timeout', 'cap') || '",' || assigned || task
        WHEN step = 'ok' THEN '"hold":' || hold || ',"model":"' || model || '","model_used":"' || model || '-2026","outcome":"ok","http_status":200,'
            || '"latency_ms":' || 300 + dice('latency', call) % 9000 || ',"usage":{"prompt_tokens":' || 20 + dice('prompt', call) % 300
            || ',"completion_tokens":' || 8 + dice('completion', call) % 200
            || CASE call % 5 WHEN 0 THEN ',"cached_tokens":16' WHEN 1 THEN ',"reasoning_tokens":7' ELSE '' END
            || '},"generation_id":"gen-' || call || '-' || hold || '","charge_nanousd":' || 400000 + dice('cost', call)
            || ',"charge_basis":"' || if(call % 9 = 0, 'priced', 'reported') || '","finish_reason":"stop"}'
        WHEN step = 'bad' THEN '"hold":' || hold || ',"model":"' || model || '","outcome":"' || problem || '",'
            || if(problem IN ('http_error', 'provider_error'), '"http_status":503,"error":"upstream",', '')
            || '"latency_ms":' || 100 + dice('latency', call) % 60000 || ',"charge_nanousd":0,"charge_basis":"released"}'
        WHEN step = 'fallback' THEN '"hold":' || hold || ',"from_model":"anthropic/claude-sonnet-4","to_model":"google/gemini-2.5-flash",'
            || '"reason":"' || problem || '"' || if(problem IN ('http_error', 'provider_error'), ',"http_status":503}', '}')
        WHEN step IN ('correction', 'late') THEN '"hold":' || hold || ',' || budgets || '"basis":"reported","reason":"late_answer",'
            || '"author":"reconciler"' || if(step = 'late', ',"assumed_nanousd":-31000000}', '}')
        WHEN step = 'plan' THEN '"plan":"growth","cap_nanousd":400000000000,"author":"ops","reason":"asked"}'
        WHEN step = 'credit' THEN '"author":"ops","reason":"sorry"}'
        WHEN step = 'paid' THEN '"budget":"prepaid:client-' || call % 100 || ':total","cap_nanousd":0,"settled_nanousd":0,"held_nanousd":0,'
            || '"content_hash":"c","credit":"pay-' || call || '","author":"shop","reason":"payment"}'
        WHEN step = 'alert' THEN '"kind":"budget","budget":"day:user-' || user || ':' || strftime(make_timestamp(begun_ms * 1000), '%Y-%m-%d')
            || '","window":"' || strftime(make_timestamp(begun_ms * 1000), '%Y-%m-%d') || '","fraction":"0.5","cap_nanousd":400000000000,'
            || '"settled_nanousd":200000000000,"cause":"call-' || call || '"}'
        WHEN step = 'charge' THEN budgets || '"basis":"priced","outcome":"recorded","model":"openai/gpt-4o-mini",'
            || '"usage":{"prompt_tokens":21,"completion_tokens":' || 8 + dice('completion', call) % 200 || '},"generation_id":"gen-' || call || '"}'
        WHEN step = 'over' THEN '"hold":' || hold || ',"hold_nanousd":' || freed || ',"overage_nanousd":' || cost - freed || ',' || budgets
            || '"basis":"reported","outcome":"done"}'
        WHEN step = 'done' THEN '"hold":' || hold || ',"hold_nanousd":' || freed || ',' || budgets || '"basis":"reported","outcome":"done"}'
        WHEN step = 'failed' THEN '"hold":' || hold || ',"hold_nanousd":' || freed || ',' || budgets
            || '"basis":"released","outcome":"failed","reason":"' || problem || '"}'
        ELSE '"hold":' || hold || ',"hold_nanousd":' || freed || ',' || budgets || '"basis":"assumed","assumed_nanousd":' || cost
            || ',"outcome":"' || step || '","reason":"no sign of life"}'
    END AS payload
FROM texts
ORDER BY seq;
