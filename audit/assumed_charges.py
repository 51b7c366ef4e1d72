"""Finds the assumed charges of requests with a given outcome, for `tollbook cost release`.

A hold that was corrected in any other way, by a person, by the provider or by a late answer, is left out: whoever
corrected it knew more.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from tollbook.audit.reader import AuditReader, Selection
from tollbook.inference.releases import AssumedCharge
from tollbook.schemas.events import CostAdjusted, CostRecorded, Event, ModelCalled
from tollbook.schemas.identifiers import EntryId

OUTCOMES: Final = (
    "http_error", "provider_error", "invalid_response", "timeout", "connection_error", "abandoned", "expired",
    "taken_over",
)  # fmt: skip
"""How a request can end whose cost is assumed: the outcome of its attempt; `expired` or `taken_over` where no attempt
was recorded, since its worker died."""


@dataclass(frozen=True, slots=True)
class Found:
    """The charges, oldest first, and how many were left out because their hold was corrected."""

    charges: tuple[AssumedCharge, ...]
    corrected: int


@dataclass(slots=True)
class _Attempt:
    number: int
    outcome: str
    amount_nanousd: int
    at: EntryId


@dataclass(slots=True)
class _Hold:
    """One hold: the assumed costs of its attempts, and whether it was settled or corrected later."""

    user_id: str
    attempts: dict[int, _Attempt] = field(default_factory=dict[int, _Attempt])
    is_settled: bool = False
    cost_nanousd: int = 0
    assumed_nanousd: int = 0
    is_corrected: bool = False

    def take(self, event: Event) -> None:
        match event.payload:
            case ModelCalled(charge_basis="assumed") as payload if payload.charge_nanousd:
                self._add(event, payload.outcome, payload.charge_nanousd)
            case CostRecorded() as payload:
                self.is_settled = True
                self.cost_nanousd, self.assumed_nanousd = event.amount, payload.assumed_nanousd
                # The rest is of a request whose end nobody has recorded.
                rest = payload.assumed_nanousd - sum(each.amount_nanousd for each in self.attempts.values())
                if rest > 0 and payload.outcome in ("expired", "taken_over"):
                    self._add(event, payload.outcome, rest)
            case CostAdjusted() as payload:
                self.cost_nanousd += event.amount
                self.assumed_nanousd += payload.assumed_nanousd
                attempt = self.attempts.get(event.attempt)
                if payload.basis == "released" and attempt and event.amount == -attempt.amount_nanousd:
                    del self.attempts[event.attempt]
                else:
                    self.is_corrected = True
            case _:
                pass

    def _add(self, event: Event, outcome: str, amount_nanousd: int) -> None:
        self.attempts[event.attempt] = _Attempt(event.attempt, outcome, amount_nanousd, EntryId.parse(event.id))


async def find_assumed_charges(
    reader: AuditReader, *, outcomes: Iterable[str], since_ms: int, until: EntryId, user_id: str | None = None
) -> Found:
    """Find what is assumed of requests that ended so, between two moments; `until` is included.

    Errors: as `AuditReader.tables`.
    """
    wanted = frozenset(outcomes)
    texts = tuple(f'"outcome":"{outcome}"' for outcome in sorted(wanted))
    candidates = await reader.events(
        Selection(
            user_id=user_id,
            types=("model-called", "cost-recorded"),
            since_ms=since_ms,
            until=until,
            payload_contains=texts,
        )
    )
    call_ids = frozenset(event.call_id for event in candidates if _is_assumed(event))
    if not call_ids:
        return Found((), 0)
    types = ("model-called", "cost-recorded", "cost-adjusted")
    holds: dict[tuple[str, int], _Hold] = {}
    for event in await reader.events(Selection(user_id=user_id, call_ids=call_ids, types=types)):
        assert isinstance(event.payload, ModelCalled | CostRecorded | CostAdjusted)
        key = (event.call_id, event.payload.hold)
        hold = holds.get(key)
        if hold is None or (hold.is_settled and isinstance(event.payload, CostRecorded)):
            # Once its record has expired, an id may begin a new life; the gate knows the latest alone.
            hold = holds[key] = _Hold(event.user_id)
        hold.take(event)
    found: list[tuple[EntryId, AssumedCharge]] = []
    corrected = 0
    for (call_id, number), hold in holds.items():
        chosen = [
            each
            for each in hold.attempts.values()
            if each.outcome in wanted and each.at.ms >= since_ms and each.at <= until
        ]
        if not hold.is_settled or not chosen:
            continue
        if hold.is_corrected or sum(each.amount_nanousd for each in chosen) > hold.assumed_nanousd:
            corrected += len(chosen)
            continue
        for each in chosen:
            charge = AssumedCharge(
                call_id=call_id,
                user_id=hold.user_id,
                hold=number,
                attempt=each.number,
                outcome=each.outcome,
                amount_nanousd=each.amount_nanousd,
                hold_cost_nanousd=hold.cost_nanousd,
                hold_assumed_nanousd=hold.assumed_nanousd,
            )
            found.append((each.at, charge))
    return Found(tuple(charge for _, charge in sorted(found, key=lambda pair: pair[0])), corrected)


def _is_assumed(event: Event) -> bool:
    match event.payload:
        case ModelCalled() as payload:
            return payload.charge_basis == "assumed" and payload.charge_nanousd > 0
        case CostRecorded() as payload:
            return payload.assumed_nanousd > 0
        case _:
            return False
