UPDATE position
SET id = last.id, seq = last.seq, events = position.events + last.events
FROM (SELECT arg_max(id, seq) AS id, max(seq) AS seq, count(*) AS events FROM batch) AS last
WHERE position.partition = $partition;
