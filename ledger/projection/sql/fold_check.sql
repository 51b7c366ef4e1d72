-- Every event has the members that its type cannot do without: the first that has not.
SELECT arg_min(id, seq) AS unreadable
FROM batch
WHERE NOT is_readable;
