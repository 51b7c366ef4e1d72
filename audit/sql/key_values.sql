-- Keys of the gateway as the events give them, by the fields of the gate's hash: the payload that stands there as JSON, or
-- the text; `created_ms` is what the gate adds to the payload of a key.
WITH created AS (
    SELECT payload->>'key_id' AS key_id, payload->>'hash' AS hash, payload::VARCHAR AS payload, epoch_ms(recorded_at) AS ms, seq
    FROM events
    WHERE type = 'key-created' AND partition = $partition
),
revoked AS (
    SELECT payload->>'key_id' AS key_id, arg_max(payload::VARCHAR, seq) AS payload
    FROM events
    WHERE type = 'key-revoked' AND partition = $partition
    GROUP BY ALL
)
SELECT key_id, hash AS field, payload AS document, ms AS created_ms, NULL AS text
FROM created
UNION ALL
SELECT key_id, key_id, NULL, NULL, hash
FROM created
UNION ALL
SELECT r.key_id, c.hash || ' revoked', r.payload, NULL, NULL
FROM revoked AS r
JOIN created AS c ON c.key_id = r.key_id;
