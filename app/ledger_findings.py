"""What `tollbook doctor` finds out about the ledger: its projection and archive, and the processes on it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import ResponseError

from tollbook.app.connect import query_projection
from tollbook.app.findings import Finding, count_of, first_line
from tollbook.consumers.backlog import read_backlog
from tollbook.inference.settings import Settings
from tollbook.inference.signs_of_life import Sign, read_signs, settings_digests
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.stops import is_recovering, read_stop
from tollbook.ledger.keys import GROUP, Keys, dead_letters, dropped_tasks, projector_lease, worker_key
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import as_map, time_ms
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.tasks import TaskStream

# A projector that is further behind than this is stuck, or too slow for what is written.
_LATE_S: Final = 60.0
# Workers settle an overdue hold within a minute.
_OVERDUE_MS: Final = 120_000
_RECOVER: Final = (
    "restore Redis' newer data if there is any, else look with `tollbook recover`; docs/operators/recover.md says more"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the ledger is looked at. `is_at_rest`: nothing runs on it."""

    settings: Settings
    pipeline: CommandPipeline
    redis_url: str
    keys: tuple[Keys, ...]
    is_at_rest: bool

    async def ask(self, *command: str | int) -> Any:
        """Return a reply of Redis. Errors: LedgerUnavailable; ResponseError."""
        return await self.pipeline.execute(*command)


@dataclass(frozen=True, slots=True)
class Folded:
    """Up to where a partition is folded."""

    ledger_id: str
    entry: str
    seq: int


async def projection_findings(place: Place) -> AsyncIterator[Finding]:
    """Say whether DuckDB belongs to the ledger, is up to date, and agrees with it."""
    try:
        folded = await asyncio.to_thread(_read_folded, place.settings)
    except LedgerError as exc:
        yield Finding("duckdb", "warning", str(exc), "`tollbook up` or `tollbook projector` makes it")
        return
    except Exception as exc:  # noqa: BLE001 - whatever is wrong with the file is a finding.
        yield Finding("duckdb", "failed", first_line(exc), "move the file away: it is rebuilt from the ledger")
        return
    positions, discrepancies = folded
    problem = await _other_ledger(place, next(iter(positions.values())).ledger_id if positions else None)
    if problem is not None:
        yield problem
        return
    yield Finding("duckdb", "ok", f"{sum(each.seq for each in positions.values()):,} events folded")
    if discrepancies:
        yield Finding(
            "projection",
            "failed",
            f"{count_of(discrepancies, 'event')} where the projection and the ledger disagree",
            "see the table `discrepancies`; stop spending until it is explained",
        )
    lost, behind, late_s = await _compare(place, positions)
    if lost:
        yield Finding("ledger", "failed", "; ".join(lost), _RECOVER)
    else:
        yield Finding("ledger", "ok", "it still has the last event that was folded")
    if place.is_at_rest:
        yield Finding("lag", "ok", f"{count_of(behind, 'event')} to be folded at the next start")
    elif late_s > _LATE_S:
        found = f"the projection is {count_of(behind, 'event')} and {late_s:.0f} s behind"
        yield Finding("lag", "failed", found, "calls of new users wait; see the projector's log, or start it again")
    else:
        yield Finding("lag", "ok", f"the projection is {count_of(behind, 'event')} behind")


def _read_folded(settings: Settings) -> tuple[dict[int, Folded], int]:
    rows = query_projection(
        settings,
        "SELECT partition, ledger_id, id, seq, (SELECT count(*) FROM discrepancies) AS discrepancies FROM position",
    )
    positions = {row["partition"]: Folded(row["ledger_id"], row["id"], int(row["seq"])) for row in rows}
    return positions, int(rows[0]["discrepancies"]) if rows else 0


async def _other_ledger(place: Place, folded_id: str | None) -> Finding | None:
    """Return what is wrong if Redis holds another ledger than the folded one, or none; None if they agree."""
    stored: bytes | None = await place.ask("HGET", place.keys[0].meta, "ledger_id")
    found = stored.decode() if stored else None
    if folded_id is None or found == folded_id:
        return None
    return Finding(
        "duckdb",
        "failed",
        f"{place.settings.data_dir} and Redis do not belong together: the projection is of ledger {folded_id}, "
        f"{hide_password(place.redis_url)} holds {'ledger ' + found if found else 'no ledger'} "
        f"under {place.settings.namespace!r}",
        "correct REDIS_URL, TOLLBOOK_NAMESPACE or TOLLBOOK_DATA_DIR; if Redis was emptied or replaced, restore it",
    )


async def _compare(place: Place, positions: dict[int, Folded]) -> tuple[list[str], int, float]:
    """Return what the ledger lacks of the folded events, how many events are not folded, and since when, in seconds."""
    lost, behind, late_s = list[str](), 0, 0.0
    now_ms = time_ms(await place.ask("TIME"))
    for keys in place.keys:
        at = positions.get(keys.partition, Folded("", "0-0", 0))
        removed, length, same, newer = await asyncio.gather(
            place.ask("HGET", keys.meta, "removed"),
            place.ask("XLEN", keys.ledger),
            place.ask("XRANGE", keys.ledger, at.entry, at.entry, "COUNT", 1),
            place.ask("XRANGE", keys.ledger, f"({at.entry}", "+", "COUNT", 1),
        )
        written = int(removed or 0) + int(length)
        if written < at.seq or (not same and at.seq > int(removed or 0)):
            lost.append(
                f"event {at.entry}, folded last in partition {keys.partition}, is no longer on the ledger: "
                "it went back in time"
            )
        behind += max(0, written - at.seq)
        if newer:
            late_s = max(late_s, (now_ms - EntryId.parse(newer[0][0].decode()).ms) / 1000)
    return lost, behind, late_s


async def archive_findings(place: Place) -> AsyncIterator[Finding]:
    """Say whether everything that was trimmed off the stream stands in the archive."""
    from tollbook.ledger.archive.segments import Archive, ArchiveDamaged

    archive, events = Archive(place.settings.archive_path), 0
    for keys in place.keys:
        try:
            segments = await asyncio.to_thread(archive.segments, keys.partition)
            for segment in segments:
                _check_presence(segment.path, segment.manifest.file_bytes)
        except (ArchiveDamaged, OSError) as exc:
            yield Finding("archive", "failed", str(exc), "put the file back from a backup; `tollbook verify` says more")
            return
        removed = int(await place.ask("HGET", keys.meta, "removed") or 0)
        archived = segments[-1].manifest.last_seq if segments else 0
        if (segments and segments[0].manifest.first_seq != 1) or archived < removed:
            yield Finding(
                "archive",
                "failed",
                f"partition {keys.partition}: events up to {removed:,} were trimmed off the stream, and not all of "
                f"them are in {place.settings.archive_path}",
                "correct TOLLBOOK_ARCHIVE_DIR, or put the files back from a backup",
            )
            return
        events += archived
    yield Finding("archive", "ok", f"complete: {count_of(events, 'event')}; `tollbook verify` proves their content")


def _check_presence(path: Any, size: int) -> None:
    from tollbook.ledger.archive.segments import ArchiveDamaged

    try:
        found = path.stat().st_size
    except OSError as exc:
        raise ArchiveDamaged(path, f"cannot be read ({exc.strerror})") from exc
    if found != size:
        raise ArchiveDamaged(path, "is not the file that was sealed")


async def stop_findings(place: Place) -> AsyncIterator[Finding]:
    """Say whether calls were stopped for cause, a recovery was interrupted, and charges wait to be booked."""
    for keys in place.keys:
        reason, recovers, unbooked = await asyncio.gather(
            read_stop(place.pipeline, [keys]),
            is_recovering(place.pipeline, keys),
            place.ask("HLEN", keys.unbooked),
        )
        if reason:
            yield Finding(
                "calls",
                "failed",
                f"stopped in partition {keys.partition}: {reason}",
                "mend the cause; the projector lets calls begin again once it has checked",
            )
        if recovers:
            yield Finding(
                "recovery",
                "failed",
                f"the recovery of partition {keys.partition} has not ended",
                "unless `tollbook recover` runs just now, run it with --yes: it finishes what was begun",
            )
        if unbooked:
            yield Finding(
                "unbooked",
                "failed",
                f"{count_of(unbooked, 'charge')} of partition {keys.partition} could not be booked",
                f"{_RECOVER}; they are booked once the ledger is in order",
            )


async def process_findings(place: Place) -> AsyncIterator[Finding]:
    """Say which processes are alive, and which of them has another version or decides by other settings."""
    owner, signs = await asyncio.gather(
        place.ask("GET", projector_lease(place.settings.namespace)),
        read_signs(place.pipeline, place.settings.namespace),
    )
    if owner is None:
        yield Finding(
            "projector",
            "failed",
            "none is alive: nothing is folded, and calls wait as soon as they need a newer balance",
            "start `tollbook up` or `tollbook projector`",
        )
    else:
        yield Finding("projector", "ok", "alive")
    if signs:
        parts = Counter(sign.part for sign in signs)
        yield Finding("processes", "ok", ", ".join(count_of(number, part) for part, number in sorted(parts.items())))
    for problem in _differences(signs):
        yield problem
    own = settings_digests(place.settings)
    differing = sorted({name for sign in signs for name in sign.differing_settings(own)})
    if differing and not any(True for _ in _differences(signs)):
        yield Finding(
            "settings",
            "warning",
            f"{', '.join(differing)}: here it is not what the running processes have",
            "give this command their settings, or start them again with these",
        )


def _differences(signs: Sequence[Sign]) -> list[Finding]:
    """Compare every process with what most have."""
    if not signs:
        return []
    usual = Counter(tuple(sorted(sign.settings.items())) for sign in signs).most_common(1)[0][0]
    version = Counter(sign.version for sign in signs).most_common(1)[0][0]
    found = list[Finding]()
    for sign in signs:
        if differing := sign.differing_settings(dict(usual)):
            found.append(
                Finding(
                    "settings",
                    "failed",
                    f"{sign.part} {sign.name} decides by another {', '.join(differing)} than the others",
                    "start it again with the settings of the others",
                )
            )
        if sign.version != version:
            found.append(
                Finding(
                    "version",
                    "warning",
                    f"{sign.part} {sign.name} runs version {sign.version}, the others {version}",
                    "start it again with that version",
                )
            )
    return found


async def task_findings(place: Place) -> AsyncIterator[Finding]:
    """Say what of the tasks needs a person: dead letters, holds overdue, tasks unread or dropped."""
    namespace = place.settings.namespace
    letters = int(await place.ask("XLEN", dead_letters(namespace)))
    if letters:
        yield Finding(
            "dead letters",
            "warning",
            f"{count_of(letters, 'task')} could not be executed",
            "`tollbook dead-letters list`",
        )
    now_ms = time_ms(await place.ask("TIME"))
    overdue = 0
    for keys in place.keys:
        overdue += len(
            await place.ask("ZRANGEBYSCORE", keys.holds, "-inf", f"({now_ms - _OVERDUE_MS}", "LIMIT", 0, 1000)
        )
    if overdue and not place.is_at_rest:
        yield Finding(
            "holds",
            "failed",
            f"{count_of(overdue, 'hold')} should have been settled: their money is not free",
            "start a worker, which settles them; its log says what keeps it from that",
        )
    for stream in TaskStream:
        async for finding in _backlog(place, stream.value):
            yield finding


async def _backlog(place: Place, stream: str) -> AsyncIterator[Finding]:
    backlog = await read_backlog(place.pipeline, stream)
    dropped = int(await place.ask("HGET", dropped_tasks(place.settings.namespace), stream) or 0)
    if dropped or backlog.dropped:
        yield Finding(
            f"stream {stream}",
            "warning",
            f"{count_of(max(dropped, backlog.dropped), 'task')} dropped unread, by a publisher's MAXLEN",
            f"publish without MAXLEN; HDEL {dropped_tasks(place.settings.namespace)} {stream} forgets them",
        )
    if place.is_at_rest or not backlog.unread:
        return
    if not await _has_reader(place, stream):
        yield Finding(
            f"stream {stream}",
            "failed",
            f"{count_of(backlog.unread, 'task')} and no worker that reads them",
            f"start one: tollbook worker --streams {stream}",
        )


async def _has_reader(place: Place, stream: str) -> bool:
    try:
        replies: list[Any] = await place.ask("XINFO", "CONSUMERS", stream, GROUP)
    except ResponseError:
        return False
    for reply in replies:
        name: str = as_map(reply)[b"name"].decode()
        if await place.ask("EXISTS", worker_key(place.settings.namespace, name)):
            return True
    return False
