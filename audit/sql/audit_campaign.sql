-- Calls that name a campaign, or that were booked to its budget in any period.
SELECT DISTINCT call_id
FROM batch
WHERE campaign_id = $campaign_id
    OR list_bool_or(list_transform(
        budgets, lambda b: starts_with(b.budget, 'campaign:' || $campaign_id || ':')
            AND NOT contains(substr(b.budget, length('campaign:' || $campaign_id || ':') + 1), ':')
    ));
