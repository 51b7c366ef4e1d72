-- Budgets whose balance, cap or name differs from their events: each budget with both values.
WITH moves AS (
    SELECT user_budget(user_id, period) AS budget, partition, settled, held, cap, last_seq
    FROM (
        SELECT
            user_id, period, partition,
            sum(amount_usd) FILTER (type <> 'budget-reserved') AS settled,
            sum(CASE type WHEN 'budget-reserved' THEN amount_usd WHEN 'cost-recorded' THEN -hold_usd END) AS held,
            arg_max(coalesce(cap_usd, 0), seq) FILTER (type = 'budget-reserved') AS cap,
            max(seq) AS last_seq
        FROM events
        WHERE type IN ('budget-reserved', 'cost-recorded', 'cost-adjusted') AND user_id <> '' AND period <> ''
        GROUP BY ALL
    )
    UNION ALL
    SELECT
        further.budget, partition,
        sum(amount_usd) FILTER (type <> 'budget-reserved'),
        sum(CASE type WHEN 'budget-reserved' THEN amount_usd WHEN 'cost-recorded' THEN -hold_usd WHEN 'budget-opened' THEN hold_usd END),
        arg_max(coalesce(usd(further.cap_nanousd), 0), seq) FILTER (type IN ('budget-reserved', 'budget-opened')),
        max(seq)
    FROM (
        SELECT
            seq, type, partition, amount_usd, hold_usd,
            unnest(json_transform(payload, '{"budgets": [{"budget": "VARCHAR", "cap_nanousd": "BIGINT"}]}').budgets)
                AS further
        FROM events
        WHERE type IN ('budget-reserved', 'cost-recorded', 'cost-adjusted', 'budget-opened')
            AND (contains(payload, 'budgets') OR contains(payload, '\u'))
    )
    GROUP BY ALL
),
given AS (
    SELECT
        budget, any_value(partition) AS partition, coalesce(sum(settled), 0) AS settled, coalesce(sum(held), 0) AS held,
        arg_max(cap, last_seq) AS cap, max(last_seq) AS last_seq
    FROM moves
    GROUP BY budget
)
SELECT
    budget,
    nanousd(coalesce(b.settled_usd, 0)) AS settled,
    nanousd(coalesce(b.held_usd, 0)) AS held,
    nanousd(coalesce(g.settled, 0)) AS given_settled,
    nanousd(coalesce(g.held, 0)) AS given_held
FROM budgets AS b
FULL JOIN given AS g USING (budget)
WHERE b.settled_usd IS DISTINCT FROM g.settled OR b.held_usd IS DISTINCT FROM g.held
    OR b.cap_usd IS DISTINCT FROM g.cap OR b.last_seq IS DISTINCT FROM g.last_seq OR b.partition <> g.partition
    OR b.name <> split_part(budget, ':', 1) OR b."window" <> split_part(budget, ':', -1)
    OR b.checksum <> balance_hash(budget, b.settled_usd, b.held_usd)
    OR b."value" <> array_to_string(string_split(budget, ':')[2:-2], ':') -- G8
ORDER BY budget;
