-- Descriptions of the views and their columns; made again together with the views.

COMMENT ON VIEW newest_event IS 'When the newest folded event was appended; the other views use it as the current time.';
COMMENT ON COLUMN newest_event.recorded_at IS 'By the Redis clock; NULL before the first event.';

COMMENT ON VIEW spend_by_user IS 'One row per user, all periods together; by period, see spend.';
COMMENT ON COLUMN spend_by_user.user_id IS 'User.';
COMMENT ON COLUMN spend_by_user.periods IS 'Billing periods with any event.';
COMMENT ON COLUMN spend_by_user.calls IS 'Calls that were allowed.';
COMMENT ON COLUMN spend_by_user.denied IS 'Calls refused.';
COMMENT ON COLUMN spend_by_user.spent_usd IS 'Settled spend, in dollars.';
COMMENT ON COLUMN spend_by_user.assumed_usd IS 'Part of the spend that is an assumption, in dollars.';
COMMENT ON COLUMN spend_by_user.reserved_usd IS 'Open holds, in dollars.';

COMMENT ON VIEW spend_by_plan IS 'Spend per billing period and plan.';
COMMENT ON COLUMN spend_by_plan.period IS 'Billing period that is charged.';
COMMENT ON COLUMN spend_by_plan.plan IS 'Plan of the user at the call''s last hold; NULL for spend without a hold.';
COMMENT ON COLUMN spend_by_plan.calls IS 'Calls that were allowed.';
COMMENT ON COLUMN spend_by_plan.users IS 'Users with such a call.';
COMMENT ON COLUMN spend_by_plan.spent_usd IS 'Settled spend, corrections included, in dollars.';
COMMENT ON COLUMN spend_by_plan.assumed_usd IS 'Part of the spend that is an assumption, in dollars.';

COMMENT ON VIEW spend_by_campaign IS 'Spend per billing period and campaign.';
COMMENT ON COLUMN spend_by_campaign.period IS 'Billing period that is charged.';
COMMENT ON COLUMN spend_by_campaign.campaign_id IS 'Campaign of the task; NULL where it names none.';
COMMENT ON COLUMN spend_by_campaign.calls IS 'Calls that were allowed.';
COMMENT ON COLUMN spend_by_campaign.users IS 'Users with such a call.';
COMMENT ON COLUMN spend_by_campaign.spent_usd IS 'Settled spend, corrections included, in dollars.';
COMMENT ON COLUMN spend_by_campaign.assumed_usd IS 'Part of the spend that is an assumption, in dollars.';

COMMENT ON VIEW spend_by_task_type IS 'Spend per billing period and task type.';
COMMENT ON COLUMN spend_by_task_type.period IS 'Billing period that is charged.';
COMMENT ON COLUMN spend_by_task_type.task_type IS 'Type of the task; NULL for spend without a hold.';
COMMENT ON COLUMN spend_by_task_type.calls IS 'Calls that were allowed.';
COMMENT ON COLUMN spend_by_task_type.users IS 'Users with such a call.';
COMMENT ON COLUMN spend_by_task_type.spent_usd IS 'Settled spend, corrections included, in dollars.';
COMMENT ON COLUMN spend_by_task_type.assumed_usd IS 'Part of the spend that is an assumption, in dollars.';

COMMENT ON VIEW spend_by_model IS 'Spend per billing period and model asked for: the charge of each settled attempt; what a hold cost beyond its attempts (a worker died, a correction) counts for its last model.';
COMMENT ON COLUMN spend_by_model.period IS 'Billing period that is charged.';
COMMENT ON COLUMN spend_by_model.model IS 'Model asked for.';
COMMENT ON COLUMN spend_by_model.attempts IS 'HTTP requests whose hold is settled.';
COMMENT ON COLUMN spend_by_model.spent_usd IS 'Settled spend, corrections included, in dollars.';
COMMENT ON COLUMN spend_by_model.prompt_tokens IS 'Tokens of all prompts.';
COMMENT ON COLUMN spend_by_model.completion_tokens IS 'Tokens of all completions.';

COMMENT ON VIEW policy_calendar IS 'One row: the calendar of the newest policy.';
COMMENT ON COLUMN policy_calendar.timezone IS 'Its time zone; UTC before the first policy.';
COMMENT ON COLUMN policy_calendar.month_starts_on IS 'First day of its billing periods.';

COMMENT ON VIEW spend_by_day IS 'Spend per day in which it was settled or corrected.';
COMMENT ON COLUMN spend_by_day.day IS 'Day in the time zone of the newest policy.';
COMMENT ON COLUMN spend_by_day.calls IS 'Calls that were settled or corrected.';
COMMENT ON COLUMN spend_by_day.users IS 'Their users.';
COMMENT ON COLUMN spend_by_day.spent_usd IS 'Settled spend and corrections, in dollars.';
COMMENT ON COLUMN spend_by_day.assumed_usd IS 'Part of it that is an assumption, in dollars; below zero where assumptions were confirmed.';

COMMENT ON VIEW spend_by_hour IS 'Spend per hour in which it was settled or corrected.';
COMMENT ON COLUMN spend_by_hour.hour IS 'Start of the hour, in UTC.';
COMMENT ON COLUMN spend_by_hour.calls IS 'Calls that were settled or corrected.';
COMMENT ON COLUMN spend_by_hour.users IS 'Their users.';
COMMENT ON COLUMN spend_by_hour.spent_usd IS 'Settled spend and corrections, in dollars.';
COMMENT ON COLUMN spend_by_hour.assumed_usd IS 'Part of it that is an assumption, in dollars; below zero where assumptions were confirmed.';

COMMENT ON VIEW cap_use IS 'One row per user and billing period: how much of the cap is used, and the day on which it will be used up at the user''s mean daily spend so far.';
COMMENT ON COLUMN cap_use.user_id IS 'User.';
COMMENT ON COLUMN cap_use.period IS 'Billing period.';
COMMENT ON COLUMN cap_use.plan IS 'Plan at the last event that names one.';
COMMENT ON COLUMN cap_use.cap_usd IS 'Cap in force, credit included, in dollars.';
COMMENT ON COLUMN cap_use.spent_usd IS 'Settled spend, in dollars.';
COMMENT ON COLUMN cap_use.reserved_usd IS 'Open holds, in dollars.';
COMMENT ON COLUMN cap_use.left_usd IS 'Cap minus settled spend, in dollars; below zero after an overage or a lower cap.';
COMMENT ON COLUMN cap_use.used_percent IS 'Settled spend as a percentage of the cap.';
COMMENT ON COLUMN cap_use.mean_day_usd IS 'Settled spend divided by the days from the user''s first event of the period to the newest event or the end of the period (at least one), in dollars.';
COMMENT ON COLUMN cap_use.runs_out_on IS 'Day in the policy''s time zone of the newest event plus left_usd / mean_day_usd days, or the day of that event if nothing is left; NULL if it is not before the end of the period, or the period is over.';

COMMENT ON VIEW denials IS 'One row per refused call, with the balance that refused it.';
COMMENT ON COLUMN denials.recorded_at IS 'When it was refused.';
COMMENT ON COLUMN denials.user_id IS 'User.';
COMMENT ON COLUMN denials.period IS 'Billing period.';
COMMENT ON COLUMN denials.call_id IS 'Call; the id of its task.';
COMMENT ON COLUMN denials.plan IS 'Plan of the user.';
COMMENT ON COLUMN denials.task_type IS 'Type of the task.';
COMMENT ON COLUMN denials.campaign_id IS 'Campaign of the task.';
COMMENT ON COLUMN denials.reason IS 'cap: settled spend and this call pass the cap; wait_timeout: other calls held the money for too long.';
COMMENT ON COLUMN denials.budget IS 'Budget that refused: kind, subject and window joined by colons.';
COMMENT ON COLUMN denials.asked_usd IS 'Upper bound of the call, in dollars.';
COMMENT ON COLUMN denials.settled_usd IS 'Settled spend of that budget then, in dollars.';
COMMENT ON COLUMN denials.held_usd IS 'Open holds of that budget then, in dollars.';
COMMENT ON COLUMN denials.cap_usd IS 'Cap of that budget, in dollars.';
COMMENT ON COLUMN denials.short_usd IS 'What was missing: settled, held and asked amounts minus the cap, in dollars.';
COMMENT ON COLUMN denials.partition IS 'Partition of the ledger.';
COMMENT ON COLUMN denials.seq IS 'Number of the event.';

COMMENT ON VIEW fallback_rates IS 'One row per model asked for: how often its attempts fail and are followed by a fallback.';
COMMENT ON COLUMN fallback_rates.model IS 'Model asked for.';
COMMENT ON COLUMN fallback_rates.attempts IS 'HTTP requests.';
COMMENT ON COLUMN fallback_rates.failed IS 'Of these, without a usable answer.';
COMMENT ON COLUMN fallback_rates.fallbacks IS 'Fallbacks from this model to another.';
COMMENT ON COLUMN fallback_rates.fallback_percent IS 'Fallbacks as a percentage of the attempts.';

COMMENT ON VIEW fallback_reasons IS 'One row per model, fallback model, reason and HTTP status of fallbacks.';
COMMENT ON COLUMN fallback_reasons.model IS 'Model that failed.';
COMMENT ON COLUMN fallback_reasons.to_model IS 'Model tried next.';
COMMENT ON COLUMN fallback_reasons.reason IS 'How the attempt failed.';
COMMENT ON COLUMN fallback_reasons.http_status IS 'HTTP status, where there was one.';
COMMENT ON COLUMN fallback_reasons.fallbacks IS 'Fallbacks.';
COMMENT ON COLUMN fallback_reasons.percent IS 'Percentage of the model''s fallbacks.';

COMMENT ON VIEW latency_by_model IS 'One row per model asked for: latencies of attempts that were answered, in milliseconds.';
COMMENT ON COLUMN latency_by_model.model IS 'Model asked for.';
COMMENT ON COLUMN latency_by_model.answered IS 'HTTP requests that were answered.';
COMMENT ON COLUMN latency_by_model.min_ms IS 'Shortest.';
COMMENT ON COLUMN latency_by_model.p50_ms IS '50 percent took no longer.';
COMMENT ON COLUMN latency_by_model.p90_ms IS '90 percent took no longer.';
COMMENT ON COLUMN latency_by_model.p95_ms IS '95 percent took no longer.';
COMMENT ON COLUMN latency_by_model.p99_ms IS '99 percent took no longer.';
COMMENT ON COLUMN latency_by_model.max_ms IS 'Longest.';

COMMENT ON VIEW token_prices IS 'One row per billing period and model asked for: the true price of a thousand tokens, over attempts that report tokens and whose charge is not assumed. Corrected holds with several attempts are left out, since it is not known which attempt was corrected.';
COMMENT ON COLUMN token_prices.period IS 'Billing period that is charged.';
COMMENT ON COLUMN token_prices.model IS 'Model asked for.';
COMMENT ON COLUMN token_prices.attempts IS 'HTTP requests that count here.';
COMMENT ON COLUMN token_prices.prompt_tokens IS 'Tokens of their prompts, cached ones included.';
COMMENT ON COLUMN token_prices.completion_tokens IS 'Tokens of their completions, reasoning included.';
COMMENT ON COLUMN token_prices.charged_usd IS 'Their charges, corrections included, in dollars.';
COMMENT ON COLUMN token_prices.usd_per_1000_tokens IS 'charged_usd for a thousand tokens of either kind, in dollars, rounded.';

COMMENT ON VIEW cost_certainty IS 'One row per billing period: how much of the spend is confirmed, and how much assumed.';
COMMENT ON COLUMN cost_certainty.period IS 'Billing period that is charged.';
COMMENT ON COLUMN cost_certainty.calls IS 'Settled calls.';
COMMENT ON COLUMN cost_certainty.assumed_calls IS 'Calls with an assumption in their cost.';
COMMENT ON COLUMN cost_certainty.spent_usd IS 'Settled spend, corrections included, in dollars.';
COMMENT ON COLUMN cost_certainty.confirmed_usd IS 'Part that the provider reported or that was priced from its usage, in dollars.';
COMMENT ON COLUMN cost_certainty.assumed_usd IS 'Part that is an assumption, in dollars.';
COMMENT ON COLUMN cost_certainty.assumed_percent IS 'Assumed part as a percentage of the spend.';
COMMENT ON COLUMN cost_certainty.adjusted_usd IS 'Sum of the corrections, in dollars.';

COMMENT ON VIEW open_holds IS 'One row per open hold, and for how long it has been open.';
COMMENT ON COLUMN open_holds.user_id IS 'User.';
COMMENT ON COLUMN open_holds.call_id IS 'Call; the id of its task.';
COMMENT ON COLUMN open_holds.period IS 'Billing period that is charged.';
COMMENT ON COLUMN open_holds.task_type IS 'Type of the task.';
COMMENT ON COLUMN open_holds.plan IS 'Plan of the user.';
COMMENT ON COLUMN open_holds.campaign_id IS 'Campaign of the task.';
COMMENT ON COLUMN open_holds.worker IS 'Worker that holds it.';
COMMENT ON COLUMN open_holds.model IS 'Model asked for.';
COMMENT ON COLUMN open_holds.hold IS 'Number of the hold within its call.';
COMMENT ON COLUMN open_holds.held_usd IS 'Held, extensions included, in dollars.';
COMMENT ON COLUMN open_holds.opened_at IS 'When it was opened.';
COMMENT ON COLUMN open_holds.open_s IS 'Seconds from then to the newest event.';
COMMENT ON COLUMN open_holds.expires_at IS 'When the sweeper may settle it, as set when it was opened.';
COMMENT ON COLUMN open_holds.partition IS 'Partition of the ledger.';
COMMENT ON COLUMN open_holds.seq IS 'Number of the event that opened it.';
