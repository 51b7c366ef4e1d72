-- Every hold stands against each budget of the policy in force whose attributes its event states: leaving one out would
-- pass its cap unseen.
WITH wanted AS (
    SELECT
        e.partition, e.seq, e.id, e.payload, p.version,
        unnest(from_json(p.content->'budgets', '[{"name": "VARCHAR", "by": ["VARCHAR"]}]')) AS rule,
        p.definitions,
        ['user', 'plan', 'task', 'model'] || CASE WHEN e.campaign_id IS NULL THEN [] ELSE ['campaign'] END
            || coalesce(json_keys(e.payload, '$.tags'), []) AS stated
    FROM (SELECT * FROM events WHERE type = 'budget-reserved' AND kind = 'hold') AS e
    ASOF JOIN (SELECT * FROM policies WHERE json_array_length(content->'budgets') > 0) AS p
        ON p.partition = e.partition AND p.seq < e.seq
    ANTI JOIN policies AS later ON later.partition = p.partition AND later.seq > p.seq AND later.seq < e.seq
),
named AS (
    SELECT
        partition, seq, id, version,
        rule.name || CASE WHEN definitions->>rule.name IS NULL THEN '' ELSE '~' || (definitions->>rule.name) END AS name,
        list_transform(from_json(payload->'budgets', '[{"budget": "VARCHAR"}]'),
            lambda stamp: split_part(stamp.budget, ':', 1)) AS held
    FROM wanted
    WHERE list_has_all(stated, coalesce(rule.by, []))
)
SELECT partition, seq, id, NULL AS budget, format('the hold is not against budget {} of policy {}', name, version) AS problem
FROM named
WHERE NOT list_contains(coalesce(held, []), name) -- audits G11
ORDER BY partition, seq;
