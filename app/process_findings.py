"""`tollbook doctor`'s checks of the processes on a ledger, and of the tasks and holds that wait for them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from redis.exceptions import ResponseError

from tollbook.app.findings import Finding, Place, count_of
from tollbook.consumers.alerts.queue import receiver_states
from tollbook.consumers.backlog import read_backlog
from tollbook.inference.signs_of_life import Sign, read_signs, settings_digests
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.probe import check_writable
from tollbook.ledger.gate.replies import FunctionsMissing
from tollbook.ledger.keys import GROUP, dead_letters, dropped_tasks, projector_lease, worker_key
from tollbook.ledger.server.connection import as_map

# Workers settle an overdue hold within a minute.
_OVERDUE_MS: Final = 120_000


async def process_findings(place: Place) -> AsyncIterator[Finding]:
    """Report which processes are alive, and which of them has another version or other settings."""
    owner, signs = await asyncio.gather(
        place.ask("GET", projector_lease(place.settings.namespace)),
        read_signs(place.pipeline, place.settings.namespace),
    )
    problem = await _write_problem(place) if owner is None else None
    if problem is not None:
        found = f"unknown whether one is alive, because it cannot renew its lease on this server: {problem}"
        yield Finding("projector", "failed", found, "no call is made until the server accepts writes again")
    elif owner is None:
        yield Finding(
            "projector",
            "failed",
            "no projector is alive: nothing is folded, and calls wait when they need a newer balance",
            "start `tollbook up` or `tollbook projector`",
        )
    else:
        yield Finding("projector", "ok", "alive")
    if signs:
        parts = Counter(sign.part for sign in signs)
        yield Finding("processes", "ok", ", ".join(count_of(number, part) for part, number in sorted(parts.items())))
    for sign in signs:
        if sign.holds_back is not None:
            found = f"{sign.part} {sign.name} holds tasks back: {sign.holds_back}"
            yield Finding("tasks", "failed", found, "fix this cause; then the tasks are executed")
    for difference in _differences(signs):
        yield difference
    own = settings_digests(place.settings)
    differing = sorted({name for sign in signs for name in sign.differing_settings(own)})
    if differing and not any(True for _ in _differences(signs)):
        yield Finding(
            "settings",
            "warning",
            f"{', '.join(differing)}: differs here from the running processes",
            "give this command their settings, or restart them with these",
        )


def _differences(signs: Sequence[Sign]) -> list[Finding]:
    """Compare every process with the most common settings and version."""
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
                    f"{sign.part} {sign.name} has another {', '.join(differing)} than the others",
                    "restart it with the settings of the others",
                )
            )
        if sign.version != version:
            found.append(
                Finding(
                    "version",
                    "warning",
                    f"{sign.part} {sign.name} runs version {sign.version}, the others {version}",
                    "restart it with that version",
                )
            )
    return found


async def task_findings(place: Place) -> AsyncIterator[Finding]:
    """Report tasks that need a person: dead letters, overdue holds, unread or dropped tasks."""
    namespace = place.settings.namespace
    letters = int(await place.ask("XLEN", dead_letters(namespace)))
    if letters:
        yield Finding(
            "dead letters",
            "warning",
            f"{count_of(letters, 'task')} could not be executed",
            "`tollbook dead-letters list`",
        )
    overdue = 0
    for keys in place.keys:
        now_ms = await place.pipeline.now_ms(keys.meta)
        overdue += len(
            await place.ask("ZRANGEBYSCORE", keys.holds, "-inf", f"({now_ms - _OVERDUE_MS}", "LIMIT", 0, 1000)
        )
    if overdue and not place.is_at_rest:
        yield Finding(
            "holds",
            "failed",
            f"{count_of(overdue, 'hold')} should have been settled; their money stays held",
            "start a worker, which settles them; if it does not, its log says why",
        )
    for stream in place.policy.streams:
        async for finding in _backlog(place, stream):
            yield finding


async def receiver_findings(place: Place) -> AsyncIterator[Finding]:
    """Report which receivers of alerts do not accept them."""
    for state in await receiver_states(place.pipeline.execute, place.settings.namespace):
        if state.problem is not None:
            waiting = f"; {count_of(state.waiting, 'alert')} waiting" if state.waiting else ""
            yield Finding(
                f"alerts {state.name}",
                "warning",
                f"the receiver does not accept them: {state.problem}{waiting}",
                "`tollbook alerts test` tests it",
            )
        elif not place.is_at_rest:
            yield Finding(f"alerts {state.name}", "ok", f"{count_of(state.delivered, 'alert')} delivered")


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
        problem = await _write_problem(place)
        if problem is not None:
            found = f"{count_of(backlog.unread, 'task')} unread, and unknown whether a worker is alive: {problem}"
            yield Finding(f"stream {stream}", "failed", found, "workers go on when the server accepts writes again")
            return
        yield Finding(
            f"stream {stream}",
            "failed",
            f"{count_of(backlog.unread, 'task')} unread, and no worker reads this stream",
            f"start one: tollbook worker --streams {stream}",
        )


async def _write_problem(place: Place) -> str | None:
    """Return why the server accepts no writes; None if it does. Without writes, no process can show that it lives."""
    try:
        await check_writable(place.pipeline, place.keys[0])
    except FunctionsMissing:
        return None
    except LedgerError as exc:
        return str(exc)
    return None


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
