-- The first event that lacks a member that its type requires.
SELECT arg_min(id, seq) AS unreadable
FROM batch
WHERE NOT is_readable;
