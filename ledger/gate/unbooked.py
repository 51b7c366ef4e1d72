"""Charges that the ledger could not take, since it went back in time: noted beside it until they are booked.

A note stands in Redis (`{tollbook:P}:unbooked`) and, where the process has a data directory, in a file of its own
there: a restored Redis replaces the hash, the file survives. It holds numbers and ids, and no completion (G10).
Whoever books a charge forgets its note. What another machine notes of it is forgotten there: booking twice changes
nothing.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tollbook.ledger.gate.requests import AttemptEvent, ChargeRequest, SettleRequest
from tollbook.ledger.keys import Keys
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.private_files import make_private_folder, read_private, sync_folder, write_private
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.events import CostRecorded, FallbackUsed, ModelCalled
from tollbook.schemas.identifiers import EntryId, budget_name, check_id
from tollbook.schemas.money import MAX_NANOUSD

FOLDER: Final = "unbooked"
"""The folder of the notes, in a process's data directory."""
_OF_ATTEMPT: Final = {"model-called": ModelCalled, "fallback-used": FallbackUsed}
_log = LazyLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnbookedCharge:
    """One charge that is not on the ledger. Amounts are nano-dollars.

    `hold` is the number of the call's hold that it settles; 0 for spend that was recorded without a hold.
    `seen` is the newest event that the process had been told of: where it is missing, the ledger is not in order.
    `process` is the process that noted it; a worker's is the consumer of its sign of life.
    `payload` is the JSON object of the `cost-recorded` event, `events` those of its attempts.
    """

    ledger_id: str
    partition: int
    call_id: str
    hold: int
    user_id: str
    period: str
    budgets: tuple[str, ...]
    cost_nanousd: int
    assumed_nanousd: int
    attempt: int
    payload: str
    events: tuple[AttemptEvent, ...] = ()
    content_hash: str = ""
    seen: EntryId
    process: str = ""

    @property
    def settle_request(self) -> SettleRequest:
        """The settlement of its hold. The answer is not kept, so the call may be run again."""
        return SettleRequest(
            call_id=self.call_id,
            user_id=self.user_id,
            hold=self.hold,
            cost_nanousd=self.cost_nanousd,
            assumed_nanousd=self.assumed_nanousd,
            attempt=self.attempt,
            is_final=False,
            payload=self.payload,
            budgets=self.budgets,
            events=self.events,
        )

    @property
    def charge_request(self) -> ChargeRequest:
        """The charge of spend without a hold."""
        return ChargeRequest(
            call_id=self.call_id,
            user_id=self.user_id,
            period=self.period,
            content_hash=self.content_hash,
            cost_nanousd=self.cost_nanousd,
            assumed_nanousd=self.assumed_nanousd,
            payload=self.payload,
            budgets=self.budgets,
        )

    def knows_less(self, assumed_nanousd: int) -> bool:
        """Whether others were told more of its hold, of whose cost so much is assumed: the provider answered them.

        Nobody told this process what its last attempt cost, and what the others' answer freed may be spent (G1).
        """
        called = [event for event in self.events if event.type == "model-called"]
        is_last_assumed = bool(called) and json.loads(called[-1].payload)["charge_basis"] == "assumed"
        return is_last_assumed and self.assumed_nanousd > assumed_nanousd


async def note_unbooked(pipeline: CommandPipeline, keys: Keys, charge: UnbookedCharge, *, folder: Path | None) -> None:
    """Note a charge in Redis, and in a file of `folder` where the data directory around it exists.

    A repeat changes nothing. A file that cannot be written is logged.
    Errors: LedgerUnavailable where Redis does not answer.
    """
    text = json.dumps(_to_json(charge))
    if folder is not None:
        try:
            await asyncio.to_thread(_write, folder, _file_name(charge), text)
        except OSError as exc:
            _log.error("unbooked.not_written", call_id=charge.call_id, problem=str(exc))
    await pipeline.execute("HSET", keys.unbooked, _field(charge), text)


async def read_unbooked(
    pipeline: CommandPipeline | None, keys: Keys, *, ledger_id: str, folder: Path | None
) -> list[UnbookedCharge]:
    """Return the noted charges of a partition, each once, by call id: those in Redis, and those in files of `folder`.

    Without a `pipeline`, the files alone. A note that cannot be read is logged. Errors: LedgerUnavailable; OSError.
    """
    texts = dict[str, str]()
    if folder is not None:
        texts.update(await asyncio.to_thread(lambda: dict(_files(folder))))
    if pipeline is not None:
        flat: list[bytes] | dict[bytes, bytes] = await pipeline.execute("HGETALL", keys.unbooked)
        pairs = flat.items() if isinstance(flat, dict) else zip(flat[0::2], flat[1::2], strict=True)
        # What somebody else has put there may be no text; it is told of below, and delays nobody.
        texts.update({f"{keys.unbooked} {_text(field)}": _text(text) for field, text in pairs})
    found = dict[tuple[str, int], UnbookedCharge]()
    for place, text in texts.items():
        try:
            charge = _from_json(json.loads(text))
        except (ValueError, KeyError, TypeError) as exc:
            _log.error("unbooked.unreadable", place=place, problem=str(exc) or type(exc).__name__)
            continue
        if (charge.ledger_id, charge.partition) == (ledger_id, keys.partition):
            found[charge.call_id, charge.hold] = charge
    return [found[key] for key in sorted(found)]


async def forget_unbooked(
    pipeline: CommandPipeline, keys: Keys, charge: UnbookedCharge, *, folder: Path | None
) -> None:
    """Remove the note of a charge that is booked, or that a person has decided on; one that is gone is no error.

    Errors: LedgerUnavailable; OSError.
    """
    await pipeline.execute("HDEL", keys.unbooked, _field(charge))
    if folder is not None:
        await asyncio.to_thread((folder / _file_name(charge)).unlink, missing_ok=True)


def unbooked_charge(
    request: SettleRequest | ChargeRequest, *, ledger_id: str, partition: int, seen: EntryId, process: str
) -> UnbookedCharge:
    """Return the note of a settlement, or of spend without a hold."""
    if isinstance(request, SettleRequest):
        hold, attempt, events, content_hash = request.hold, request.attempt, request.events, ""
        period = request.budgets[0].rsplit(":", 1)[1]
    else:
        hold, attempt, events, content_hash = 0, 0, (), request.content_hash
        period = request.period
    return UnbookedCharge(
        ledger_id=ledger_id,
        partition=partition,
        call_id=request.call_id,
        hold=hold,
        user_id=request.user_id,
        period=period,
        budgets=request.budgets,
        cost_nanousd=request.cost_nanousd,
        assumed_nanousd=request.assumed_nanousd,
        attempt=attempt,
        payload=request.payload,
        events=events,
        content_hash=content_hash,
        seen=seen,
        process=process,
    )


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _field(charge: UnbookedCharge) -> str:
    return f"{charge.call_id} {charge.hold}"


def _file_name(charge: UnbookedCharge) -> str:
    name = f"{charge.ledger_id} {charge.partition} {_field(charge)}"
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _write(folder: Path, name: str, text: str) -> None:
    if not folder.parent.is_dir():
        return  # A program that only makes calls keeps no data directory.
    make_private_folder(folder)
    write_private(folder / name, text)
    sync_folder(folder)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.json")):
        try:
            yield str(path), read_private(path)
        except FileNotFoundError:
            continue  # Another process has booked it meanwhile.


def _to_json(charge: UnbookedCharge) -> dict[str, Any]:
    return {
        name: getattr(charge, name) for name in UnbookedCharge.__slots__ if name not in ("payload", "events", "seen")
    } | {
        "payload": json.loads(charge.payload),
        "events": [[event.type, event.attempt, json.loads(event.payload)] for event in charge.events],
        "seen": str(charge.seen),
    }


def _from_json(noted: dict[str, Any]) -> UnbookedCharge:
    events = tuple(AttemptEvent(kind, attempt, _compact(payload)) for kind, attempt, payload in noted["events"])
    values: dict[str, Any] = noted | {
        "budgets": tuple(noted["budgets"]),
        "payload": _compact(noted["payload"]),
        "events": events,
        "seen": EntryId.parse(noted["seen"]),
    }
    charge = UnbookedCharge(**values)
    numbers = (charge.partition, charge.hold, charge.cost_nanousd, charge.assumed_nanousd, charge.attempt)
    if not all(type(number) is int and 0 <= number <= MAX_NANOUSD for number in numbers):
        raise ValueError("a number is missing, negative or too large")
    # The gate takes payloads as they are: what is not as events are would be on the ledger for good, and stop the fold.
    CostRecorded.model_validate(noted["payload"])
    for kind, _, payload in noted["events"]:
        _OF_ATTEMPT[kind].model_validate(payload)
    if charge.budgets[:1] != (budget_name("user", check_id(charge.user_id), charge.period),):
        raise ValueError("its first budget is not its user's")
    return charge


def _compact(payload: Any) -> str:
    return json.dumps(payload, separators=(",", ":"), ensure_ascii=False)
