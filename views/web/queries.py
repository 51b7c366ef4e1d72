"""Queries that only the web view uses: recent calls and refusals, of all users or of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tollbook.views.queries import Place
from tollbook.views.web.projection import Query, Row

# The event types that decide a call's status.
_TYPES = "('budget-reserved', 'budget-denied', 'cost-recorded')"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFilter:
    """Which calls to find; None does not restrict. `until` is the last day, included.

    `before` is where the page before ended: the last event of its last call.
    """

    user_id: str | None = None
    status: str | None = None
    model: str | None = None
    campaign_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    before: Place | None = None


def found_query(wanted: CallFilter, limit: int) -> Query:
    """Return the query for the keys of the newest matching calls; it reads few columns of all events."""
    values: dict[str, Any] = {"limit": limit}
    where = [f"type IN {_TYPES}"]
    having: list[str] = []
    if wanted.user_id is not None:
        where.append("user_id = $user_id")
        values["user_id"] = wanted.user_id
    if wanted.campaign_id is not None:
        having.append("arg_max(campaign_id, seq) = $campaign_id")
        values["campaign_id"] = wanted.campaign_id
    if wanted.model is not None:
        having.append("$model IN (arg_max(model, seq), arg_max(model_used, seq))")
        where[0] = f"type IN {_TYPES[:-1]}, 'model-called')"
        values["model"] = wanted.model
    if wanted.status is not None:
        having.append(f"{_STATUS} = $status")
        values["status"] = wanted.status
    if wanted.since is not None:
        having.append("max(recorded_at) >= $since")
        values["since"] = wanted.since
    if wanted.until is not None:
        having.append("max(recorded_at) < $until")
        values["until"] = wanted.until + timedelta(days=1)
    if wanted.before is not None:
        having.append(
            "(epoch_ms(max(recorded_at)), partition, max(seq)) < ($before_ms, $before_partition, $before_seq)"
        )
        names = ("before_ms", "before_partition", "before_seq")
        values |= dict(zip(names, wanted.before, strict=True))
    sql = f"""
        SELECT partition, call_id, user_id, period, epoch_ms(max(recorded_at)) AS last_ms, max(seq) AS last_seq
        FROM events
        WHERE {" AND ".join(where)}
        GROUP BY partition, call_id, user_id, period
        HAVING {" AND ".join(having) or "true"}
        ORDER BY last_ms DESC, partition DESC, last_seq DESC
        LIMIT $limit
    """  # noqa: S608 - made of the constants above.
    return Query(sql, values)


_STATUS = """arg_max(CASE type
    WHEN 'budget-reserved' THEN 'open'
    WHEN 'budget-denied' THEN 'denied'
    WHEN 'cost-recorded' THEN CASE outcome WHEN 'taken_over' THEN 'closed' WHEN 'recorded' THEN 'done' ELSE outcome END
END, seq)"""


def calls_query(found: Sequence[Row]) -> Query:
    """Return the query for these calls' rows of the view `calls`, the newest first."""
    sql = """
        SELECT c.*, f.last_ms, make_timestamptz(f.last_ms * 1000) AS last_at
        FROM calls AS c
        JOIN (
            SELECT unnest($partitions) AS partition, unnest($calls) AS call_id, unnest($users) AS user_id,
                unnest($periods) AS period, unnest($moments) AS last_ms, unnest($seqs) AS found_seq
        ) AS f USING (partition, call_id, user_id, period)
        WHERE list_contains($calls, c.call_id)
        ORDER BY f.last_ms DESC, f.partition DESC, f.found_seq DESC
    """
    columns = {"partitions": "partition", "calls": "call_id", "users": "user_id", "periods": "period"}
    columns |= {"moments": "last_ms", "seqs": "last_seq"}
    return Query(sql, {name: [row[column] for row in found] for name, column in columns.items()})


def refusals_query(user_id: str | None, limit: int, before: Place | None) -> Query:
    """Return the query for the newest refusals, or for those before a place; `at_ms` is each one's time."""
    where = ["true"]
    values: dict[str, Any] = {"limit": limit}
    if user_id is not None:
        where.append("user_id = $user_id")
        values["user_id"] = user_id
    if before is not None:
        where.append(f"(epoch_ms(recorded_at), partition, seq) < {before}")
    sql = f"""
        SELECT *, epoch_ms(recorded_at) AS at_ms
        FROM denials
        WHERE {" AND ".join(where)}
        ORDER BY recorded_at DESC, partition DESC, seq DESC
        LIMIT $limit
    """  # noqa: S608 - made of the constants above, and numbers.
    return Query(sql, values)
