"""Verifies what `tollbook recover` declared: `ledger-recovered` events, and events that enter lost ones again.

Events alone cannot prove that others were lost. But a lost event must be absent from its old place, a restored one must
be there, an event that enters a lost one again must name it, and numbers and sums must agree. A declaration that does
not fit was not written by a recovery: somebody may have written it to hide that they removed events.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import duckdb
from pydantic import ValidationError

from tollbook.audit.verification.findings import Findings
from tollbook.schemas.events import LedgerRecovered
from tollbook.schemas.identifiers import EntryId

_DECLARED: Final = """
    SELECT partition, seq, id, payload::VARCHAR FROM events WHERE type = 'ledger-recovered' ORDER BY partition, seq
"""
# The text is searched first: few events name a lost one, and to read the JSON of all takes long.
_ENTERED: Final = """
    SELECT partition, seq, id, payload->>'recovered_id',
        CASE WHEN type IN ('cost-recorded', 'cost-adjusted') THEN nanousd(amount_usd)::BIGINT ELSE 0 END
    FROM events
    WHERE contains(payload::VARCHAR, '"recovered_id"') AND (payload->>'recovered_id') IS NOT NULL
    ORDER BY partition, seq
"""
_STANDING: Final = "SELECT partition, id, seq FROM events WHERE id IN (SELECT unnest(?))"
# Declarations without `after_id`: the newest event that is older than what was lost.
_BEFORE: Final = """
    SELECT coalesce(max(seq), 0) FROM events
    WHERE partition = $partition AND seq < $seq AND (epoch_ms(recorded_at) < $ms
        OR epoch_ms(recorded_at) = $ms AND split_part(id, '-', 2)::BIGINT < $n)
"""
_ID: Final = re.compile(r"\d{1,15}-\d{1,18}")

_Standing = Mapping[tuple[int, str], int]
"""Where events stand: their number, by partition and id."""


class _Entered(NamedTuple):
    """An event that enters the lost one `lost_id` again, at a cost in nano-dollars; 0 where it is no cost."""

    partition: int
    seq: int
    entry_id: str
    lost_id: str
    cost_nanousd: int


class _Declared(NamedTuple):
    """A declaration. `after_seq` is the number of the last event before the loss; -1: it does not stand."""

    seq: int
    payload: LedgerRecovered
    after_seq: int
    first: EntryId
    last: EntryId

    def covers(self, lost_id: str) -> bool:
        """Whether it declares this event lost."""
        return _ID.fullmatch(lost_id) is not None and self.first <= EntryId.parse(lost_id) <= self.last


def check_recoveries(cursor: duckdb.DuckDBPyConnection, trusted: Mapping[int, int], findings: Findings) -> None:
    """Check what is declared lost and what is entered again, beyond the trusted part. Errors: duckdb.Error."""
    rows = cursor.execute(_DECLARED).fetchall()
    entered = [_Entered(*row) for row in cursor.execute(_ENTERED).fetchall()]
    payloads = [_read(row[3]) for row in rows]
    wanted = {each.lost_id for each in entered}
    for payload in filter(None, payloads):
        wanted |= {payload.first_id, payload.last_id, payload.after_id or payload.first_id}
    found = cursor.execute(_STANDING, [sorted(wanted)]).fetchall()
    standing = {(partition, entry_id): seq for partition, entry_id, seq in found}
    declared: dict[int, list[_Declared]] = {}
    for (partition, seq, entry_id, _), payload in zip(rows, payloads, strict=True):
        problem = "declares events lost, and does not say which"
        if payload is not None:
            each = _declared(cursor, partition, seq, payload, standing)
            before = declared.setdefault(partition, [])
            of_partition = [one for one in entered if one.partition == partition]
            problem = _problem_of(each, partition, before, of_partition, standing)
            before.append(each)
        if problem and seq > trusted.get(partition, 0):  # audits G7
            findings.add("recovery", problem, partition=partition, seq=seq, event_id=entry_id)
    for one in _not_lost(entered, declared, standing):
        if one.seq > trusted.get(one.partition, 0):  # audits G2 G3
            problem = f"enters event {one.lost_id} again, which stands on the ledger and is not lost"
            findings.add("recovery", problem, partition=one.partition, seq=one.seq, event_id=one.entry_id)


def _read(text: str) -> LedgerRecovered | None:
    """Return a declaration's payload; None if it cannot be read or has an invalid id."""
    try:
        payload = LedgerRecovered.model_validate_json(text)
    except ValidationError:
        return None
    ids = (payload.first_id, payload.last_id, payload.after_id or "0-0")
    return payload if all(map(_ID.fullmatch, ids)) else None


def _declared(
    cursor: duckdb.DuckDBPyConnection, partition: int, seq: int, payload: LedgerRecovered, standing: _Standing
) -> _Declared:
    first = EntryId.parse(payload.first_id)
    if payload.after_id is None:
        given = {"partition": partition, "seq": seq, "ms": first.ms, "n": first.seq}
        (after_seq,) = cursor.execute(_BEFORE, given).fetchone() or (0,)
    elif payload.after_id == "0-0":
        after_seq = 0
    else:
        after_seq = standing.get((partition, payload.after_id), -1)
    return _Declared(seq, payload, after_seq, first, EntryId.parse(payload.last_id))


def _problem_of(
    each: _Declared, partition: int, before: Sequence[_Declared], entered: Sequence[_Entered], standing: _Standing
) -> str | None:
    """Return the first thing that does not fit in a declaration."""
    said, (first, last) = each.payload, (each.first, each.last)
    span = f"{said.first_id} to {said.last_id}"
    if last < first or (first.ms == last.ms and last.seq - first.seq + 1 != said.events):
        # Within a millisecond, Redis numbers entries without a gap.
        return f"declares {said.events} events lost, {span}, which are not so many"
    if said.events < 1 + (first != last):
        return f"declares {said.events} events lost, {span}, which are more"
    if not 0 <= each.after_seq < each.seq:
        return f"declares a loss after event {said.after_id}, which does not stand before it"
    if any(said.last_id == other.payload.last_id for other in before):
        return f"declares {span} lost, which an earlier event has declared"
    first_seq, last_seq = (standing.get((partition, entry_id)) for entry_id in (said.first_id, said.last_id))
    place = (each.after_seq + 1, each.after_seq + said.events)
    if said.restored:
        if said.restored != said.events or said.entered or said.entered_nanousd or said.lost_holds:
            return f"declares {said.restored} of {said.events} lost events restored: all of them are, or none"
        if (first_seq, last_seq) != place or place[1] >= each.seq:
            return f"declares {span} restored, which do not stand as events {place[0]} to {place[1]}"
        return None
    if first_seq == place[0] or last_seq == place[1]:
        return f"declares {span} lost, which stand on the ledger"
    if said.after_id is None and (first_seq or last_seq):
        return f"declares {span} lost, which stand on the ledger"
    return _entered_otherwise(each, entered)


def _entered_otherwise(each: _Declared, entered: Sequence[_Entered]) -> str | None:
    """Compare what it says was entered again, beside newer events, with the events that say so."""
    said = each.payload
    if each.seq == each.after_seq + 1:
        return "declares events lost beside newer ones, and none stand between"
    again = [one for one in entered if each.after_seq < one.seq < each.seq and each.covers(one.lost_id)]
    found = (len(again), sum(one.cost_nanousd for one in again))
    if found != (said.entered, said.entered_nanousd):
        return (
            f"declares that {said.entered} events enter again what was lost, at {said.entered_nanousd} nano-dollars; "
            f"{found[0]} do, at {found[1]}"
        )
    if said.lost_holds > said.events or (said.lost_held_nanousd and not said.lost_holds):
        return (
            f"declares {said.lost_holds} holds of {said.lost_held_nanousd} nano-dollars lost with {said.events} events"
        )
    return None


def _not_lost(
    entered: Sequence[_Entered], declared: Mapping[int, Sequence[_Declared]], standing: _Standing
) -> Iterator[_Entered]:
    """Yield what enters an event again that stands before it.

    Servers that both were written to may have given an id twice: that of a lost event may stand behind the loss.
    """
    for one in entered:
        stands = standing.get((one.partition, one.lost_id))
        if stands is None or stands >= one.seq:
            continue
        losses = [each for each in declared.get(one.partition, ()) if not each.payload.restored]
        if not any(each.covers(one.lost_id) and each.after_seq < stands for each in losses):
            yield one
