-- A refusal states what was settled and held, which must be true; and the amount must not have fit.
WITH denied AS (
    SELECT
        partition, seq, id, budget, reason, nanousd(amount_usd) AS amount, nanousd(cap_usd) AS cap,
        (payload->>'$.settled_nanousd')::BIGINT AS settled, (payload->>'$.held_nanousd')::BIGINT AS held
    FROM events
    WHERE type = 'budget-denied'
),
sums AS (
    SELECT
        partition, budget, seq,
        sum(settled) OVER of_budget AS settled,
        sum(held) OVER of_budget AS held
    FROM verify_moves
    WHERE budget IN (SELECT budget FROM denied)
    WINDOW of_budget AS (PARTITION BY partition, budget ORDER BY seq)
),
joined AS (
    SELECT d.*, coalesce(s.settled, 0) AS true_settled, coalesce(s.held, 0) AS true_held
    FROM denied AS d
    ASOF LEFT JOIN sums AS s ON s.partition = d.partition AND s.budget = d.budget AND s.seq < d.seq
)
SELECT partition, seq, id, budget,
    CASE
        WHEN settled IS DISTINCT FROM true_settled OR held IS DISTINCT FROM true_held
            THEN format('the refusal states {} nano-dollars settled and {} held, it was {} and {}',
                settled, held, true_settled, true_held)
        ELSE format('{} nano-dollars are refused that fit', amount)
    END AS problem
FROM joined
WHERE settled IS DISTINCT FROM true_settled OR held IS DISTINCT FROM true_held
    OR CASE reason WHEN 'cap' THEN settled + amount <= cap ELSE settled + held + amount <= cap END -- audits G9
ORDER BY partition, seq;
