"""`tollbook doctor`'s checks of the ledger: projection, archive, accounts, and what stops calls."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tollbook.app.connect import query_projection
from tollbook.app.findings import Finding, Place, count_of, first_line
from tollbook.inference.settings import Settings
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.stops import is_recovering, read_stop
from tollbook.ledger.gate.unbooked import FOLDER, read_unbooked
from tollbook.ledger.keys import Keys
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.server.address import hide_password
from tollbook.schemas.failures import FAILURES
from tollbook.schemas.identifiers import EntryId

if TYPE_CHECKING:
    from tollbook.ledger.archive.segments import Archive, Segment

_MAX_SHOWN: Final = 5
# A projector that is further behind is stuck, or too slow for the rate of events.
_LATE_S: Final = 60.0
_RECOVER: Final = (
    "restore newer data of Redis if there is any; otherwise run `tollbook recover`, see docs/operators/recover.md"
)


_FAILURES: Final = """
SELECT reason, count(*) AS failures, string_agg(DISTINCT asked, ', ' ORDER BY asked) AS models
FROM (SELECT *, model || coalesce(' at ' || (payload->>'provider'), '') AS asked FROM events)
WHERE type = 'model-called' AND reason IS NOT NULL
    AND recorded_at > (SELECT max(recorded_at) FROM events) - INTERVAL 1 HOUR
GROUP BY reason ORDER BY failures DESC, reason
"""


@dataclass(frozen=True, slots=True)
class Folded:
    """The position up to which a partition is folded."""

    ledger_id: str
    entry: str
    seq: int


async def projection_findings(place: Place) -> AsyncIterator[Finding]:
    """Report whether DuckDB belongs to the ledger, is up to date, and agrees with it."""
    try:
        folded = await asyncio.to_thread(_read_folded, place.settings)
    except LedgerError as exc:
        yield Finding("duckdb", "warning", str(exc), "`tollbook up` or `tollbook projector` creates it")
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
        yield Finding("ledger", "ok", "it still has the last folded event")
    if place.is_at_rest:
        yield Finding("lag", "ok", f"{count_of(behind, 'event')} to be folded at the next start")
    elif late_s > _LATE_S:
        found = f"the projection is {count_of(behind, 'event')} and {late_s:.0f} s behind"
        yield Finding("lag", "failed", found, "calls of new users wait; see the projector's log, or restart it")
    else:
        yield Finding("lag", "ok", f"the projection is {count_of(behind, 'event')} behind")


async def failure_findings(place: Place) -> AsyncIterator[Finding]:
    """Report the requests of the last hour that got no answer, by reason."""
    try:
        rows = await asyncio.to_thread(query_projection, place.settings, _FAILURES)
    except Exception:  # noqa: BLE001 - `projection_findings` reports a file that cannot be read.
        return
    if not rows:
        yield Finding("failures", "ok", "no request failed in the last hour of the ledger")
        return
    found = ", ".join(f"{row['failures']:,} {row['reason']} ({row['models']})" for row in rows)
    known = [FAILURES[row["reason"]] for row in rows if row["reason"] in FAILURES]
    yield Finding("failures", "warning", f"requests without an answer in the last hour: {found}", " ".join(known[:3]))


def _read_folded(settings: Settings) -> tuple[dict[int, Folded], int]:
    rows = query_projection(
        settings,
        "SELECT partition, ledger_id, id, seq, (SELECT count(*) FROM discrepancies) AS discrepancies FROM position",
    )
    positions = {row["partition"]: Folded(row["ledger_id"], row["id"], int(row["seq"])) for row in rows}
    return positions, int(rows[0]["discrepancies"]) if rows else 0


async def _other_ledger(place: Place, folded_id: str | None) -> Finding | None:
    """Return a finding if Redis has another ledger than the folded one, or has none; None if they agree."""
    stored: bytes | None = await place.ask("HGET", place.keys[0].meta, "ledger_id")
    found = stored.decode() if stored else None
    if folded_id is None or found == folded_id:
        return None
    return Finding(
        "duckdb",
        "failed",
        f"{place.settings.data_dir} and Redis do not belong together: the projection is of ledger {folded_id}, "
        f"{hide_password(place.redis_url)} has {'ledger ' + found if found else 'no ledger'} "
        f"under {place.settings.namespace!r}",
        "correct REDIS_URL, TOLLBOOK_NAMESPACE or TOLLBOOK_DATA_DIR; if Redis was emptied or replaced, restore it",
    )


async def _compare(place: Place, positions: dict[int, Folded]) -> tuple[list[str], int, float]:
    """Return which folded events the ledger has lost, how many events are not folded, and the lag in seconds."""
    lost, behind, late_s = list[str](), 0, 0.0
    for keys in place.keys:
        now_ms = await place.pipeline.now_ms(keys.meta)
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
                f"event {at.entry}, the last folded one of partition {keys.partition}, is no longer on the ledger: "
                "the ledger went back in time"
            )
        behind += max(0, written - at.seq)
        if newer:
            late_s = max(late_s, (now_ms - EntryId.parse(newer[0][0].decode()).ms) / 1000)
    return lost, behind, late_s


async def archive_findings(place: Place) -> AsyncIterator[Finding]:
    """Report whether the archive has every event that was trimmed from the stream."""
    from tollbook.inference.archive_place import archive_of
    from tollbook.ledger.archive.manifests import ArchiveDamaged
    from tollbook.ledger.archive.storage_errors import ArchiveRefused, ArchiveUnavailable

    events = 0
    for keys in place.keys:
        try:
            archive = archive_of(place.settings)
            segments = await asyncio.to_thread(_present_segments, archive, keys.partition)
        except (ArchiveRefused, ArchiveUnavailable) as exc:
            yield Finding("archive", "failed", str(exc), "correct TOLLBOOK_ARCHIVE_URL or the access to it")
            return
        except (ArchiveDamaged, OSError) as exc:
            yield Finding("archive", "failed", str(exc), "put the file back from a backup; `tollbook verify` says more")
            return
        removed = int(await place.ask("HGET", keys.meta, "removed") or 0)
        archived = segments[-1].manifest.last_seq if segments else 0
        if (segments and segments[0].manifest.first_seq != 1) or archived < removed:
            yield Finding(
                "archive",
                "failed",
                f"partition {keys.partition}: events up to {removed:,} were trimmed from the stream, and not all of "
                f"them are in {archive.place}",
                "correct TOLLBOOK_ARCHIVE_DIR or TOLLBOOK_ARCHIVE_URL, or put the files back from a backup",
            )
            return
        events += archived
    yield Finding("archive", "ok", f"complete: {count_of(events, 'event')}; `tollbook verify` proves their content")


def _present_segments(archive: "Archive", partition: int) -> "list[Segment]":
    """Return a partition's segments, after checking that their files exist and have the sealed size.

    Errors: ArchiveDamaged; OSError if the archive cannot be written to; ArchiveRefused; ArchiveUnavailable.
    """
    from tollbook.ledger.archive.manifests import ArchiveDamaged, manifest_name, parquet_name

    segments = archive.segments(partition)
    for segment in segments:
        try:
            size = archive.storage.size(parquet_name(segment.stem))
        except OSError as exc:
            raise ArchiveDamaged(segment.place, f"cannot be read ({exc.strerror})") from exc
        if size != segment.manifest.file_bytes:
            raise ArchiveDamaged(segment.place, "is not the file that was sealed")
    if segments:
        archive.storage.check_writing(manifest_name(segments[-1].stem))
    return segments


async def account_findings(place: Place) -> AsyncIterator[Finding]:
    """Report whether caps, plans and credits in Redis equal those of the folded events."""
    from tollbook.audit.verification.gate_state import changed_accounts, read_accounts, read_later

    try:
        rows = await asyncio.to_thread(query_projection, place.settings, _account_values())
    except Exception:  # noqa: BLE001 - `projection_findings` reports problems of DuckDB.
        return
    problems = list[str]()
    for keys in place.keys:
        folded = [row for row in rows if row["partition"] == keys.partition]
        given = {(row["user_id"], row["field"]): row["value"] for row in folded if row["field"] is not None}
        unreadable = list[tuple[str, str]]()
        found = await read_accounts(place.redis, keys, unreadable)
        # Read last, so that it includes accounts that changed while the others were read.
        last = EntryId.parse(folded[0]["id"]) if folded else EntryId(0, 0)
        later = {name for kind, name in await read_later(place.redis, keys, last) if kind == "user"}
        problems += changed_accounts(found, given, without=later)
        problems += [f"{key} is not as the gate writes it ({why})" for key, why in unreadable]
    for problem in problems[:_MAX_SHOWN]:
        yield Finding(
            "accounts", "failed", problem, "set it back, or set it with a command; `tollbook verify` says more"
        )
    if len(problems) > _MAX_SHOWN:
        yield Finding("accounts", "failed", f"and {len(problems) - _MAX_SHOWN:,} more", "`tollbook verify` shows them")
    if not problems:
        yield Finding("accounts", "ok", "caps, plans and credits in Redis equal those of the events")


def _account_values() -> str:
    values = packaged_text("tollbook.audit", "sql/account_values.sql")
    return f"SELECT * FROM position LEFT JOIN ({values}) USING (partition)"  # noqa: S608 - two texts of the package.


async def _unbooked(place: Place, keys: Keys) -> int:
    """Return how many unbooked charges a partition has. A restored Redis may have lost them; files still have them."""
    ledger_id: bytes | None = await place.ask("HGET", keys.meta, "ledger_id")
    folder = place.settings.data_dir / FOLDER
    try:
        charges = await read_unbooked(place.pipeline, keys, ledger_id=(ledger_id or b"").decode(), folder=folder)
    except OSError:
        charges = []  # Another user's files.
    return max(len(charges), await place.ask("HLEN", keys.unbooked))


async def stop_findings(place: Place) -> AsyncIterator[Finding]:
    """Report whether calls are stopped, a recovery was interrupted, or charges are unbooked."""
    for keys in place.keys:
        reason, recovers, unbooked = await asyncio.gather(
            read_stop(place.pipeline, [keys]),
            is_recovering(place.pipeline, keys),
            _unbooked(place, keys),
        )
        if reason:
            yield Finding(
                "calls",
                "failed",
                f"stopped in partition {keys.partition}: {reason}",
                "fix the cause; the projector checks it and then allows calls again",
            )
        if recovers:
            yield Finding(
                "recovery",
                "failed",
                f"the recovery of partition {keys.partition} is not finished",
                "unless `tollbook recover` is running now, run it with --yes: it finishes the recovery",
            )
        if unbooked:
            yield Finding(
                "unbooked",
                "failed",
                f"{count_of(unbooked, 'charge')} of partition {keys.partition} could not be booked",
                f"{_RECOVER}; they are booked once the ledger is in order",
            )
