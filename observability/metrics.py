"""The metrics page, in Prometheus's format.

The process that folds the ledger counts money, calls and attempts from the events. So the numbers equal the ledger's
exactly: they survive restarts, include the work of dead workers, and cost workers no time. A worker exposes only its
own state.
"""

import asyncio
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Final, get_args

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tollbook.consumers.alerts.queue import ReceiverState
from tollbook.ledger.projection.totals import LATENCY_BUCKETS_S, Sums, Totals
from tollbook.observability.catalogue import BY_NAME
from tollbook.observability.facts import Facts
from tollbook.observability.gateway_counts import GatewayCounts
from tollbook.observability.health import Readiness
from tollbook.observability.page import Page, plain
from tollbook.observability.process_state import ProcessState
from tollbook.observability.single_flight import SingleFlight
from tollbook.schemas.events import Basis
from tollbook.schemas.failures import FAILURES
from tollbook.schemas.policy import Policy
from tollbook.schemas.results import TaskStatus

OTHER: Final = "other"
"""The label of every model that neither a route nor the configured prices name: a task may name any model."""

# The statuses that OpenRouter documents (November 2026); another provider may send any number.
_STATUSES: Final = frozenset((400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503, 504, 524, 529))


class MetricsPage:
    """Renders the page, at most once a second."""

    def __init__(self, state: ProcessState, readiness: Readiness) -> None:
        self._state = state
        self._readiness = readiness
        self._facts = state.facts
        self._known_models: frozenset[str] = frozenset()
        self._pages = SingleFlight(self._collect)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """Return the page and its content type: OpenMetrics if the client accepts it, else Prometheus's own format."""
        families = await self._pages.get()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collected(families))
        ProcessCollector(registry=registry)
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    async def _collect(self) -> list[Metric]:
        facts, health = await asyncio.gather(self._facts.read(), self._readiness.get())
        page = Page()
        page.add("tollbook_ready", health.ok)
        page.add("tollbook_info", 1, version=version("tollbook"), part=self._state.part)
        _add_facts(page, facts)
        if facts.totals is not None:
            opened = self._state.open_ledger
            self._known_models |= frozenset() if opened is None else known_models(opened.handle.policy)
            _add_totals(page, facts.totals, self._known_models)
        _add_process(page, self._state)
        if self._state.gateway is not None:
            _add_gateway(page, self._state.gateway)
        return [*page.families(), *_faststream(self._state.faststream)]


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def known_models(policy: Policy) -> frozenset[str]:
    """Return the model ids that get a label of their own: those of the routes and of the configured prices."""
    return (
        frozenset(target.model for route in policy.tasks.values() for target in route.targets)
        | frozenset(policy.prices)
        | frozenset(model for rule in policy.providers.values() for model in rule.prices)
    )


def _add_facts(page: Page, facts: Facts) -> None:
    if facts.are_calls_stopped is not None:
        page.add("tollbook_calls_stopped", facts.are_calls_stopped)
    for stream, backlog in (facts.backlogs or {}).items():
        page.add("tollbook_stream_entries", backlog.entries, stream=stream)
        page.add("tollbook_stream_pending", backlog.pending, stream=stream)
        if backlog.unread is not None:
            page.add("tollbook_stream_unread", backlog.unread, stream=stream)
    if facts.dead_letters is not None:
        page.add("tollbook_dead_letters", facts.dead_letters)
    if facts.dead_letters_dropped is not None:
        page.add("tollbook_dead_letters_dropped_total", facts.dead_letters_dropped)
    if facts.lag is not None:
        page.add("tollbook_projector_lag_events", facts.lag.events)
        page.add("tollbook_projector_lag_seconds", facts.lag.seconds)
    if facts.discrepancies is not None:
        page.add("tollbook_discrepancies", facts.discrepancies)
    _add_receivers(page, facts.receivers or ())


def _add_receivers(page: Page, receivers: Iterable[ReceiverState]) -> None:
    for state in receivers:
        page.add("tollbook_alerts_delivered_total", state.delivered, receiver=state.name)
        page.add("tollbook_alerts_dropped_total", state.dropped, receiver=state.name)
        page.add("tollbook_alerts_waiting", state.waiting, receiver=state.name)
        page.add("tollbook_alerts_failing", state.problem is not None, receiver=state.name)


def _add_totals(page: Page, totals: Totals, models: frozenset[str]) -> None:
    for kind, number in totals.types.items():
        page.add("tollbook_ledger_events_total", number, type=kind)
    _add_money(page, totals)
    _add_attempts(page, totals, models)
    for reason in ("cap", "wait_timeout"):
        page.add("tollbook_denied_total", 0, reason=reason)
    for group, sums in totals.groups("budget-denied"):
        page.add("tollbook_denied_total", sums.events, reason=group.reason)
        page.add("tollbook_budget_denied_total", sums.events, budget=group.budget)
    for group, sums in totals.groups("alert-raised"):
        page.add("tollbook_alerts_total", sums.events, budget=group.budget)
    for group, sums in totals.groups("fallback-used"):
        page.add("tollbook_fallbacks_total", sums.events, model=_label(group.model, models), reason=group.reason)


def _add_money(page: Page, totals: Totals) -> None:
    settled, corrected = totals.of("cost-recorded"), totals.of("cost-adjusted")
    page.add("tollbook_holds_open", totals.holds_open)
    page.add("tollbook_held_usd", float(totals.held_usd))
    page.add("tollbook_holds_total", sum(s.events for g, s in totals.groups("budget-reserved") if g.kind == "hold"))
    for basis in get_args(Basis):
        page.add("tollbook_settled_usd_total", 0, basis=basis)
    for group, sums in totals.groups("cost-recorded"):
        page.add("tollbook_settled_usd_total", float(sums.usd), basis=group.basis)
        page.add("tollbook_settlements_total", sums.events, basis=group.basis, outcome=group.outcome)
    page.add("tollbook_corrected_usd_total", float(corrected.usd), direction="up")
    page.add("tollbook_corrected_usd_total", float(corrected.less_usd), direction="down")
    page.add("tollbook_assumed_usd_total", float(settled.assumed_usd))
    page.add("tollbook_unconfirmed_usd", float(settled.assumed_usd + corrected.assumed_usd))
    page.add("tollbook_overage_usd_total", float(settled.overage_usd))


def _add_attempts(page: Page, totals: Totals, models: frozenset[str]) -> None:
    by_model: dict[str, Sums] = {}
    for group, sums in totals.groups("model-called"):
        model = _label(group.model, models)
        page.add("tollbook_attempts_total", sums.events, model=model, outcome=group.outcome)
        if group.outcome != "ok":
            status = _status(group.http_status, group.outcome)
            page.add("tollbook_provider_errors_total", sums.events, model=model, status=status)
        if group.reason:
            reason = group.reason if group.reason in FAILURES else OTHER
            page.add("tollbook_failures_total", sums.events, model=model, reason=reason)
        page.add("tollbook_usage_doubts_total", sums.events if group.is_doubted else 0, model=model)
        if group.outcome != "abandoned":
            by_model.setdefault(model, Sums()).add(sums)
        page.add("tollbook_attempt_charges_usd_total", float(sums.charge_usd), model=model)
        page.add("tollbook_tokens_total", sums.prompt_tokens, model=model, kind="prompt")
        page.add("tollbook_tokens_total", sums.completion_tokens, model=model, kind="completion")
    for model, sums in by_model.items():
        buckets = [(str(bound), number) for bound, number in zip(LATENCY_BUCKETS_S, sums.within, strict=True)]
        page.add_histogram(
            "tollbook_attempt_duration_seconds", [*buckets, ("+Inf", sums.events)], sums.latency_ms / 1000, model=model
        )


def _add_process(page: Page, state: ProcessState) -> None:
    opened = state.open_ledger
    if opened is not None:
        page.add("tollbook_redis_batches_total", opened.handle.pipeline.batches)
        page.add("tollbook_redis_commands_total", opened.handle.pipeline.commands)
    for worker in state.workers:
        for status in TaskStatus:
            page.add("tollbook_tasks_finished_total", worker.finished[status], status=status.value)
        page.add("tollbook_tasks_in_flight", worker.in_flight)
        page.add("tollbook_tasks_claimed_total", worker.claims.taken)
        page.add("tollbook_claims_lost_total", worker.claims.lost)
    if state.workers:
        # These numbers belong to the process, not to one worker.
        page.add("tollbook_tasks_waiting", state.workers[0].waiting)
        page.add("tollbook_request_ids_lost_total", state.workers[0].request_ids_lost)


def _add_gateway(page: Page, gateway: GatewayCounts) -> None:
    for status, number in gateway.requests.items():
        page.add("tollbook_gateway_requests_total", number, status=str(status))
    page.add("tollbook_gateway_calls_open", gateway.calls_open)
    page.add("tollbook_gateway_wrong_keys_total", gateway.wrong_keys)
    page.add("tollbook_gateway_joined_total", gateway.joined)


def _faststream(registry: CollectorRegistry | None) -> Iterator[Metric]:
    """Yield FastStream's metrics that are correct here. The others of its middleware are wrong for this worker.

    It counts a task as acknowledged, and no longer in process, when `Worker.take` returns. It sees an empty body, and
    nothing is published through it.
    """
    for family in registry.collect() if registry is not None else ():
        metric = BY_NAME.get(family.name) or BY_NAME.get(f"{family.name}_total")
        if metric is not None and family.samples:
            # Leave out the samples with each series' creation time.
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            family.documentation = plain(metric.meaning)
            yield family


def _label(model: str, known: frozenset[str]) -> str:
    return model if model in known else OTHER


def _status(http_status: int, outcome: str) -> str:
    if http_status == 0:
        return outcome
    # An error reported in a response with status 200 is not an HTTP error.
    return outcome if http_status < 400 else str(http_status) if http_status in _STATUSES else OTHER
