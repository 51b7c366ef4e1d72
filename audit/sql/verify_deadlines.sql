-- Open holds whose deadline in Redis is not the one that was stamped.
SELECT call_id, user_id, h.deadline_ms AS found, (e.payload->>'$.deadline_ms')::BIGINT AS given
FROM gate_holds AS h
JOIN events AS e USING (call_id)
ANTI JOIN gate_later AS l ON l.kind = 'call' AND l.name = call_id
WHERE e.partition = $partition AND e.kind = 'hold'
QUALIFY e.seq = max(e.seq) OVER (PARTITION BY call_id) AND found IS DISTINCT FROM given -- audits G3
ORDER BY call_id;
