"""Restoring lost events under their own ids, if nothing newer is on the stream.

The gate's `restore` appends a batch and restores, in the same step, what the events changed: tails, holds, accounts,
records of calls. So a crash leaves a ledger that ends earlier, and a second run continues from there. Balances before
the first lost event come from a fold of the ledger as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, cast

from tollbook.ledger.archive.known_events import Row
from tollbook.ledger.archive.losses import Loss
from tollbook.ledger.errors import LedgerDiverged, LedgerRefused, LedgerReplaced
from tollbook.ledger.gate.functions import function
from tollbook.ledger.keys import Keys, task_partition
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.events import ENVELOPE_FIELDS
from tollbook.schemas.identifiers import budget_name
from tollbook.schemas.upcasters import payload_object

# One step of the gate appends fewer events than this.
_LOOK_AHEAD: Final = 200
_MOVES: Final = ("budget-reserved", "cost-recorded", "cost-adjusted", "budget-opened")
_ATTEMPT_EVENTS: Final = ("model-called", "fallback-used")


class LedgerMoved(LedgerRefused):
    """Something was written to the ledger while it was being recovered."""

    def __init__(self, partition: int) -> None:
        super().__init__(
            f"partition {partition}: something was written to the ledger meanwhile. Stop all workers and programs that "
            "make calls, and run the command again: it continues from here"
        )


class Restorer:
    """Restores one partition's lost events. `ledger` is a fold of the ledger as it is now."""

    def __init__(
        self, pipeline: CommandPipeline, loss: Loss, ledger: Store, *, idempotency_ttl_s: int, batch_events: int
    ) -> None:
        self._pipeline = pipeline
        self._loss = loss
        self._ledger = ledger
        self._ttl_s = idempotency_ttl_s
        self._batch = batch_events
        self._balances = dict[str, list[int]]()

    def check(self, rows: Iterable[Row]) -> None:
        """Compare all stamps of the lost events with the balances, before anything is written. Blocks.

        Errors: LedgerDiverged.
        """
        for batch in _batches(_with_steps(rows), self._batch):
            self._pack(batch)
        self._balances.clear()

    async def restore(self, rows: Iterable[Row], note: str) -> int:
        """Append the lost events, and return how many. `note` is the payload of the event that ends the recovery.

        Errors: LedgerMoved; LedgerDiverged; LedgerUnavailable.
        """
        last, done = self._loss.common, 0
        seq, entry_id = last.seq, str(last.entry)
        for batch in _batches(_with_steps(rows), self._batch):
            keys, arguments = self._pack(batch)
            meta = self._loss.keys
            reply: Any = await self._pipeline.execute(
                "FCALL", function("restore"), 4 + len(keys), meta.meta, meta.ledger, meta.holds, meta.waiters, *keys,
                self._ledger.ledger_id, seq, entry_id, self._ttl_s, note, *arguments,
            )  # fmt: skip
            _check(reply, self._loss.keys, self._ledger.ledger_id)
            await self._claim(batch)
            seq, entry_id = batch[-1][0]["seq"], batch[-1][0]["id"]
            done += len(batch)
        return done

    def _pack(self, batch: Sequence[tuple[Row, str]]) -> tuple[list[str], list[str | int]]:
        keys, arguments = list[str](), list[str | int]()
        named = [(row, step, payload_object(row["payload"])) for row, step in batch]
        self._read({name for row, _, payload in named for name in budgets_of(row, payload)})
        for row, step, payload in named:
            names = budgets_of(row, payload)
            of = self._loss.keys
            keys += [of.account(row["user_id"]), of.call(row["call_id"]), *(of.tail(name) for name in names)]
            values = ["" if row[name] is None else row[name] for name in ENVELOPE_FIELDS]
            before = [f"{self._balances[name][0]} {self._balances[name][1]} {name}" for name in names]
            arguments += [row["id"], step, len(names), *values, *before]
            self._move(row, payload, names)
        return keys, arguments

    def _read(self, names: set[str]) -> None:
        missing = sorted(names - self._balances.keys())
        found = self._ledger.baselines(missing).balances
        self._balances |= {name: list(found.get(name, (0, 0))) for name in missing}

    def _move(self, row: Row, payload: dict[str, Any], names: Sequence[str]) -> None:
        """Update the balances, and compare them with the balances that the gate stamped into the event."""
        kind, amount = row["type"], row["amount"]
        settled = amount if kind != "budget-reserved" else 0
        held = amount if kind == "budget-reserved" else payload.get("hold_nanousd", 0)
        held = -held if kind == "cost-recorded" else held
        own = [row["committed"]] if row["user_id"] else []
        stamps = [*own, *(stamp["committed_nanousd"] for stamp in payload.get("budgets", ()))]
        for name, stamp in zip(names, stamps, strict=bool(names)):
            balance = self._balances[name]
            was = (balance[0], balance[1])
            balance[0], balance[1] = balance[0] + settled, balance[1] + held
            if sum(balance) != stamp:  # G8
                raise LedgerDiverged(budget=name, baseline_nanousd=was, ledger_nanousd=(balance[0], balance[1]))

    async def _claim(self, batch: Sequence[tuple[Row, str]]) -> None:
        """Claim the task ids for their partition again, if there are several partitions."""
        if self._ledger.partitions > 1:
            await claim_calls(self._pipeline, self._loss.keys, {row["call_id"] for row, _ in batch}, self._ttl_s)


async def claim_calls(pipeline: CommandPipeline, keys: Keys, call_ids: set[str], ttl_s: int) -> None:
    """Claim task ids for the partition that has their calls (G4); existing claims stay."""
    for call_id in sorted(call_ids - {""}):
        await pipeline.execute("SET", task_partition(keys.namespace, call_id), keys.partition, "NX", "EX", ttl_s)


def budgets_of(row: Row, payload: dict[str, Any]) -> list[str]:
    """Return the budgets that an event moves, the user's period first."""
    if row["type"] not in _MOVES:
        return []
    own = [budget_name("user", row["user_id"], row["period"])] if row["user_id"] else []
    return [*own, *(cast("str", stamp["budget"]) for stamp in payload.get("budgets", ()))]


def _check(reply: Any, keys: Keys, ledger_id: str) -> None:
    words = [word.decode() for word in reply]
    match words[0]:
        case "OK":
            return
        case "MOVED":
            raise LedgerMoved(keys.partition)
        case "DIVERGED":
            s, h, ledger_s, ledger_h = (int(number) for number in words[2:])
            raise LedgerDiverged(budget=words[1], baseline_nanousd=(s, h), ledger_nanousd=(ledger_s, ledger_h))
        case _:
            raise LedgerReplaced(expected=ledger_id, found=words[1])


def _with_steps(rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
    """Yield each event with its step of the gate: `record` for attempts without a settlement, else an empty text."""
    rows = iter(rows)
    window = list(islice(rows, _LOOK_AHEAD))
    while window:
        row = window.pop(0)
        window += islice(rows, 1)
        yield row, "record" if row["type"] in _ATTEMPT_EVENTS and not _is_settling(row, window) else ""


def _is_settling(row: Row, following: Sequence[Row]) -> bool:
    """Whether the call's settlement or correction follows directly, so that one step appended both."""
    for after in following:
        if after["call_id"] != row["call_id"]:
            return False
        if after["type"] not in _ATTEMPT_EVENTS:
            return after["type"] in ("cost-recorded", "cost-adjusted")
    return False


def _batches(rows: Iterator[tuple[Row, str]], size: int) -> Iterator[list[tuple[Row, str]]]:
    while batch := list(islice(rows, size)):
        yield batch
