-- How many users have used how much of their cap, in steps of ten percent; the last class is 100 and more.
SELECT
    least(10, greatest(0, floor(used_percent / 10)))::INTEGER * 10 AS from_percent,
    count(*) AS users
FROM chosen_cap_use($period, $plan, $user, $campaign)
WHERE used_percent IS NOT NULL
GROUP BY ALL
ORDER BY from_percent
