-- For the certificate: the highest committed amount of each budget, its place and its cap; and the least room that any
-- hold left under the cap in force at that moment.
SELECT
    budget,
    any_value(partition) AS partition,
    max(committed) AS committed_nanousd,
    arg_max(cap, (committed, -seq)) AS cap_nanousd,
    arg_max(seq, (committed, -seq)) AS seq,
    arg_max(id, (committed, -seq)) AS id,
    min(cap - committed) AS least_room_nanousd,
    count(*) AS holds
FROM verify_caps
WHERE committed IS NOT NULL
GROUP BY budget
ORDER BY budget;
