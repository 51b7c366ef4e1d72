-- The first event that lacks a member that its type requires, or has a number that its type cannot have.
SELECT arg_min(id, seq) AS unreadable
FROM batch
WHERE NOT is_readable;
