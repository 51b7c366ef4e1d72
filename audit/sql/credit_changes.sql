-- Changes of the credits of budgets, oldest first, with what the gate stamped: the budget's cap, settled and held then.
SELECT
    budget,
    type,
    payload->>'credit' AS credit,
    nanousd(amount_usd) AS change,
    coalesce((payload->>'expires_ms')::BIGINT, 0) AS expires_ms,
    coalesce(nanousd(cap_usd), 0) AS cap,
    coalesce((payload->>'settled_nanousd')::BIGINT, 0) AS settled,
    coalesce((payload->>'held_nanousd')::BIGINT, 0) AS held
FROM events
WHERE partition = $partition AND type IN ('credit-granted', 'credit-revoked', 'credit-expired') AND budget IS NOT NULL
ORDER BY seq;
