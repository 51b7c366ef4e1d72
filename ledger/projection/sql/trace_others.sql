-- Events after the watermark that the gate writes together with a record under their call or command id; and all
-- policies.
SELECT seq, id, ms, type, call_id, user_id, payload->>'content_hash' AS content_hash
FROM incoming
WHERE type = 'policy-applied' OR (
    type IN ('budget-denied', 'plan-assigned', 'plan-cleared', 'credit-granted', 'credit-revoked', 'credit-expired',
        'key-created', 'key-revoked')
    AND (ms, n) > ($ms, $n)
)
ORDER BY seq;
