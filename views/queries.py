"""Queries on the projection that `tollbook spend`, `tollbook alerts list` and the web view share."""

from typing import Final

from tollbook.ledger.projection.sql_text import quoted

SPEND_COLUMNS: Final = (
    "user_id, period, plan, cap_usd, spent_usd, reserved_usd, calls, denied, fallbacks, assumed_usd, overage_usd"
)

Place = tuple[int, int, int]
"""The end of a page of events: time (ms since the epoch), partition and number of its last event."""


def utc_column(name: str) -> str:
    """Return SQL for a time as text, in UTC."""
    return f"strftime({name} AT TIME ZONE 'UTC', '%Y-%m-%dT%H:%M:%SZ') AS {name}"


def spend_sql(user: str | None, period: str | None, top: int) -> str:
    """Return SQL for the spend of users in a period, by default the latest; of one user, by default in all periods."""
    conditions: list[str] = []
    if user is not None:
        conditions.append(f"user_id = {quoted(user)}")
    if period is not None:
        conditions.append(f"period = {quoted(period)}")
    elif user is None:
        conditions.append("period = (SELECT max(period) FROM spend)")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"SELECT {SPEND_COLUMNS} FROM spend {where} ORDER BY spent_usd DESC, user_id, period LIMIT {top}"  # noqa: S608 - quoted.


def budgets_sql(top: int) -> str:
    """Return SQL for the policy's further budgets, each in its latest window and with its latest definition."""
    return f"""
        SELECT name, value, "window", cap_usd, credit_usd, spent_usd, reserved_usd
        FROM (SELECT *, split_part(name, '~', 1) AS rule FROM budget_use WHERE name <> 'user')
        QUALIFY "window" = max("window") OVER (PARTITION BY name)
            AND name = arg_max(name, coalesce(try_cast(split_part(name, '~', 2) AS INTEGER), 0))
                OVER (PARTITION BY rule)
        ORDER BY rule, spent_usd DESC, value
        LIMIT {top}
    """  # noqa: S608 - a number.


def alerts_sql(budget: str | None, last: int, before: Place | None = None) -> str:
    """Return SQL for the raised alerts, the newest first; optionally only of one budget of the policy."""
    where = ["true"]
    if budget is not None:
        where.append(f"(name = {quoted(budget)} OR starts_with(name, {quoted(budget + '~')}))")
    if before is not None:
        where.append(f"(epoch_ms(alerts.raised_at), partition, seq) < {before}")
    return f"""
        SELECT {utc_column("raised_at")}, budget, name, value, "window", fraction, cap_usd, settled_usd, call_id, id,
            partition, seq
        FROM alerts
        WHERE {" AND ".join(where)}
        ORDER BY alerts.raised_at DESC, partition DESC, seq DESC
        LIMIT {last}
    """  # noqa: S608 - quoted, and numbers.
