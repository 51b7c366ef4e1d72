"""Every metric that Tollbook exposes: name, type, labels, meaning. docs/reference/metrics.md shows this table.

Names and units follow Prometheus's conventions. Only here are dollars floats: no decision uses a metric, and the exact
number is in DuckDB. No label has ids of users, tasks or campaigns: each label has a short, fixed list of values.
"""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["ledger", "streams", "alerts", "worker", "gateway", "process", "faststream"]
"""Which process exposes it: the one that folds the ledger (`ledger`, `streams`, `alerts`), workers (`worker`,
`faststream`), gateways, or every process."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    source: Source
    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str


_READ: Final = ("app_name", "broker", "handler")
_NONE: Final[tuple[str, ...]] = ()

METRICS: Final = (
    Metric("ledger", "tollbook_holds_open", "gauge", _NONE, "holds that are open"),
    Metric("ledger", "tollbook_held_usd", "gauge", _NONE, "dollars in open holds"),
    Metric("ledger", "tollbook_holds_total", "counter", _NONE, "holds opened"),
    Metric("ledger", "tollbook_settled_usd_total", "counter", ("basis",), "dollars settled, before corrections"),
    Metric(
        "ledger",
        "tollbook_settlements_total",
        "counter",
        ("basis", "outcome"),
        "settlements, and charges that had no hold (`recorded`)",
    ),
    Metric(
        "ledger",
        "tollbook_corrected_usd_total",
        "counter",
        ("direction",),
        "dollars by which settled costs were corrected, `up` or `down`",
    ),
    Metric("ledger", "tollbook_unconfirmed_usd", "gauge", _NONE, "dollars assumed and not corrected yet"),
    Metric("ledger", "tollbook_assumed_usd_total", "counter", _NONE, "dollars assumed at settlement"),
    Metric("ledger", "tollbook_overage_usd_total", "counter", _NONE, "dollars charged beyond the hold"),
    Metric("ledger", "tollbook_denied_total", "counter", ("reason",), "calls refused: `cap` or `wait_timeout`"),
    Metric(
        "ledger",
        "tollbook_budget_denied_total",
        "counter",
        ("budget",),
        "calls refused by each budget of the policy; `user`: the users' billing periods",
    ),
    Metric("ledger", "tollbook_alerts_total", "counter", ("budget",), "alerts raised by each budget of the policy"),
    Metric(
        "ledger",
        "tollbook_attempts_total",
        "counter",
        ("model", "outcome"),
        "requests to the provider, by how they ended",
    ),
    Metric(
        "ledger",
        "tollbook_attempt_duration_seconds",
        "histogram",
        ("model",),
        "how long requests to the provider took, abandoned ones left out",
    ),
    Metric(
        "ledger",
        "tollbook_provider_errors_total",
        "counter",
        ("model", "status"),
        "attempts that gave no completion: HTTP status, else the outcome",
    ),
    Metric(
        "ledger",
        "tollbook_failures_total",
        "counter",
        ("model", "reason"),
        "attempts without an answer, by reason, also those that were paid for",
    ),
    Metric(
        "ledger",
        "tollbook_usage_doubts_total",
        "counter",
        ("model",),
        "attempts whose reported usage contradicts itself; if it is priced, by the more expensive reading",
    ),
    Metric(
        "ledger", "tollbook_attempt_charges_usd_total", "counter", ("model",), "dollars that attempts were booked at"
    ),
    Metric(
        "ledger", "tollbook_tokens_total", "counter", ("model", "kind"), "tokens reported, `prompt` or `completion`"
    ),
    Metric(
        "ledger",
        "tollbook_fallbacks_total",
        "counter",
        ("model", "reason"),
        "changes to the fallback: the model that failed, and how",
    ),
    Metric("ledger", "tollbook_ledger_events_total", "counter", ("type",), "events folded"),
    Metric("ledger", "tollbook_discrepancies", "gauge", _NONE, "events where gate and projection disagree; must be 0"),
    Metric("ledger", "tollbook_projector_lag_events", "gauge", _NONE, "events on the ledger, not folded yet"),
    Metric(
        "ledger", "tollbook_projector_lag_seconds", "gauge", _NONE, "age of the oldest event that is not folded yet"
    ),
    Metric("streams", "tollbook_stream_entries", "gauge", ("stream",), "entries on a task stream, finished ones too"),
    Metric("streams", "tollbook_stream_unread", "gauge", ("stream",), "tasks not delivered yet"),
    Metric("streams", "tollbook_stream_pending", "gauge", ("stream",), "tasks delivered, not acknowledged yet"),
    Metric("streams", "tollbook_dead_letters", "gauge", _NONE, "tasks on the dead-letter stream"),
    Metric(
        "streams",
        "tollbook_dead_letters_dropped_total",
        "counter",
        _NONE,
        "dead letters dropped because there were too many, or they were too old",
    ),
    Metric(
        "alerts", "tollbook_alerts_delivered_total", "counter", ("receiver",), "alerts that a receiver has accepted"
    ),
    Metric("alerts", "tollbook_alerts_dropped_total", "counter", ("receiver",), "alerts given up after a day"),
    Metric("alerts", "tollbook_alerts_waiting", "gauge", ("receiver",), "alerts that a receiver has not accepted yet"),
    Metric("alerts", "tollbook_alerts_failing", "gauge", ("receiver",), "1 while deliveries to a receiver fail"),
    Metric("worker", "tollbook_tasks_finished_total", "counter", ("status",), "tasks answered and acknowledged"),
    Metric("worker", "tollbook_tasks_in_flight", "gauge", _NONE, "tasks in progress, waiting ones included"),
    Metric("worker", "tollbook_tasks_waiting", "gauge", _NONE, "tasks that wait for other calls' holds"),
    Metric("worker", "tollbook_tasks_claimed_total", "counter", _NONE, "tasks taken over from silent workers"),
    Metric("worker", "tollbook_claims_lost_total", "counter", _NONE, "tasks that others took over from this one"),
    Metric(
        "worker",
        "tollbook_request_ids_lost_total",
        "counter",
        _NONE,
        "requests whose provider's id could not be kept with the hold: if the worker dies, its hold is assumed",
    ),
    Metric(
        "gateway",
        "tollbook_gateway_requests_total",
        "counter",
        ("status",),
        "requests answered, by HTTP status; 499: the client left first",
    ),
    Metric("gateway", "tollbook_gateway_calls_open", "gauge", _NONE, "calls of clients that are running"),
    Metric("gateway", "tollbook_gateway_wrong_keys_total", "counter", _NONE, "requests without a valid key"),
    Metric("gateway", "tollbook_gateway_joined_total", "counter", _NONE, "retries that joined the call they repeat"),
    Metric(
        "process", "tollbook_redis_batches_total", "counter", _NONE, "round trips of the pipeline of commands to Redis"
    ),
    Metric("process", "tollbook_redis_commands_total", "counter", _NONE, "commands sent to Redis in these batches"),
    Metric("process", "tollbook_ready", "gauge", _NONE, "1 where `/health/ready` says yes, else 0"),
    Metric("process", "tollbook_calls_stopped", "gauge", _NONE, "1 while the projector has stopped calls, else 0"),
    Metric(
        "process",
        "tollbook_info",
        "gauge",
        ("version", "part"),
        "1; `part` is `up`, `projector`, `worker` or `gateway`",
    ),
    Metric(
        "faststream",
        "faststream_received_messages_total",
        "counter",
        _READ,
        "new entries read; `handler` is the stream",
    ),
    Metric(
        "faststream",
        "faststream_received_processed_messages_duration_seconds",
        "histogram",
        _READ,
        "how long a batch that was read waited for free slots; the count is the number of batches",
    ),
    Metric(
        "faststream",
        "faststream_received_processed_messages_exceptions_total",
        "counter",
        (*_READ, "exception_type"),
        "batches that could not be handed over; should not occur",
    ),
)
BY_NAME: Final = {metric.name: metric for metric in METRICS}
