-- In two steps, for the reason given in fold_counters.sql.
UPDATE budgets AS b SET
    settled_usd = b.settled_usd + m.settled,
    held_usd = b.held_usd + m.held,
    cap_usd = coalesce(m.cap, b.cap_usd),
    last_id = m.last_id,
    last_seq = m.last_seq,
    checksum = xor(b.checksum, xor(
        balance_hash(b.budget, b.settled_usd, b.held_usd),
        balance_hash(b.budget, b.settled_usd + m.settled, b.held_usd + m.held)
    ))
FROM balances AS m
WHERE b.budget = m.budget;

UPDATE position SET budgets = budgets + (SELECT count(*) FROM balances ANTI JOIN budgets USING (budget))
WHERE partition = (SELECT any_value(partition) FROM balances);

INSERT INTO budgets
SELECT
    budget,
    partition,
    split_part(budget, ':', 1),
    array_to_string(string_split(budget, ':')[2:-2], ':'),
    split_part(budget, ':', -1),
    settled,
    held,
    cap,
    last_id,
    last_seq,
    balance_hash(budget, settled, held)
FROM balances
ANTI JOIN budgets USING (budget);
