-- Each hold, and each refusal by the user's period, names the window that its moment is in, by the policy in force. What
-- extends a hold stays in the hold's windows. An id of an entry may be later than the moment, where a clock was set back.
WITH named AS (
    SELECT r.partition, r.seq, r.id, r.budget, regexp_extract(r.budget, '[^:]*$') AS label, epoch_ms(e.recorded_at) AS ms
    FROM verify_reserved AS r
    JOIN events AS e ON e.partition = r.partition AND e.seq = r.seq
    WHERE e.type = 'budget-denied' OR e.kind = 'hold'
),
ruled AS (
    SELECT n.*, p.seq AS policy_seq, p.version, k.kind
    FROM named AS n
    ASOF JOIN policies AS p ON p.partition = n.partition AND p.seq < n.seq
    JOIN verify_kinds AS k ON k.partition = p.partition AND k.policy_seq = p.seq AND k.name = split_part(n.budget, ':', 1)
)
SELECT partition, seq, id, budget,
    format('by policy {} it is in another {} than {} at that moment', version, kind, label) AS problem
FROM ruled
ANTI JOIN verify_windows AS w
    ON w.partition = ruled.partition AND w.policy_seq = ruled.policy_seq AND w.kind = ruled.kind
    AND w.label = ruled.label AND w.start_ms <= ruled.ms AND ruled.ms - 60000 < w.end_ms -- audits G11
ORDER BY partition, seq;
