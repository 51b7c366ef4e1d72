-- For the fold of one user's events: the budgets in the batch from which no other user spends. These are the budgets
-- of any policy so far that are kept by user, beside other attributes or not, under this user's id; and the day's, which
-- could be set before there were policies.
CREATE OR REPLACE TEMP TABLE own_budgets AS
WITH rules AS (
    SELECT DISTINCT
        rule.name || coalesce('~' || (definitions->>rule.name), '') AS name,
        list_position(rule.by, 'user') AS place,
        len(rule.by) AS attributes
    FROM (
        SELECT unnest(from_json(content->'budgets', '[{"name": "VARCHAR", "by": ["VARCHAR"]}]')) AS rule, definitions
        FROM policies
    )
    WHERE list_contains(rule.by, 'user')
    UNION
    SELECT 'day', 1, 1
),
named AS (
    SELECT DISTINCT unnest(json_transform(payload, '{"budgets": [{"budget": "VARCHAR"}]}').budgets).budget AS budget
    FROM events
    WHERE partition = $partition AND seq BETWEEN $first AND $last
)
SELECT DISTINCT budget
FROM (SELECT budget, array_to_string(string_split(budget, ':')[2:-2], ':') AS subject FROM named) AS n
JOIN rules AS r ON r.name = split_part(n.budget, ':', 1)
WHERE CASE WHEN r.attributes = 1 THEN n.subject = $user
    ELSE string_split(n.subject, ',')[r.place] = replace(replace($user, '%', '%25'), ',', '%2C') END;
