-- Commands of the batch that are on the ledger already, from a time that the gate still knew: it appends each once.
SELECT i.seq, i.id, i.type, i.call_id
FROM incoming AS i
JOIN events AS e ON e.partition = i.partition AND e.call_id = i.call_id AND e.type = i.type AND e.seq < i.seq
WHERE i.type IN ('plan-assigned', 'plan-cleared', 'credit-granted', 'credit-revoked', 'credit-expired', 'key-created',
        'key-revoked')
    AND epoch_ms(e.recorded_at) > i.ms - $kept_ms
ORDER BY i.seq
LIMIT 1;
