-- Every hold stands against each budget of the policy in force whose attributes its event states, and under their
-- values: leaving one out, or taking another's, would pass its cap unseen.
WITH wanted AS (
    SELECT
        e.partition, e.seq, e.id, e.user_id, e.campaign_id, e.task_type, e.payload, p.version,
        unnest(from_json(p.content->'budgets', '[{"name": "VARCHAR", "by": ["VARCHAR"]}]')) AS rule,
        p.definitions
    FROM (SELECT * FROM events WHERE type = 'budget-reserved' AND kind = 'hold') AS e
    ASOF JOIN (SELECT * FROM policies WHERE json_array_length(content->'budgets') > 0) AS p
        ON p.partition = e.partition AND p.seq < e.seq
    ANTI JOIN policies AS later ON later.partition = p.partition AND later.seq > p.seq AND later.seq < e.seq
),
valued AS (
    SELECT
        *,
        rule.name || CASE WHEN definitions->>rule.name IS NULL THEN '' ELSE '~' || (definitions->>rule.name) END AS name,
        list_transform(coalesce(rule.by, []), lambda attribute: CASE attribute
            WHEN 'user' THEN user_id
            WHEN 'plan' THEN payload->>'plan'
            WHEN 'campaign' THEN campaign_id
            WHEN 'task' THEN task_type
            WHEN 'model' THEN payload->'bound'->>'model'
            ELSE payload->'tags'->>attribute
        END) AS parts
    FROM wanted
),
named AS (
    SELECT
        partition, seq, id, version, name, budget_value(parts) AS subject,
        list_transform(from_json(payload->'budgets', '[{"budget": "VARCHAR"}]'),
            lambda stamp: regexp_replace(stamp.budget, ':[^:]*$', '')) AS held
    FROM valued
    WHERE len(list_filter(parts, lambda part: part IS NULL)) = 0
)
SELECT partition, seq, id, NULL AS budget,
    format('the hold is not against budget {} of policy {}', name, version)
        || CASE WHEN subject = 'all' THEN '' ELSE ' under ' || subject END AS problem
FROM named
WHERE NOT list_contains(coalesce(held, []), name || ':' || subject) -- audits G11
ORDER BY partition, seq;
