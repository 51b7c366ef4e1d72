"""The data sources of pages: the same as the commands', read without delaying calls."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tollbook.app.doctor import examine
from tollbook.app.findings import Finding
from tollbook.audit.reader import AuditReader
from tollbook.inference.address import find_redis_url
from tollbook.inference.administration import Administration
from tollbook.inference.api_keys import ApiKeys
from tollbook.inference.archive_place import archive_of
from tollbook.inference.runtime import InferenceRuntime
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.server.connection import connect
from tollbook.views.top.figures import Figures
from tollbook.views.top.gather import Gatherer
from tollbook.views.web.background import Background
from tollbook.views.web.projection import Answer, Projection, Query

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sources:
    """What a gateway's pages read and change."""

    runtime: InferenceRuntime
    keys: ApiKeys
    administration: Administration
    projection: Projection
    background: Background
    gatherer: Gatherer
    _gathering: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def figures(self) -> Figures:
        """Return the figures of `tollbook top`. It raises no errors: parts that cannot be read are in its problems."""
        async with self._gathering:
            return await self.gatherer.gather()

    async def read(self, *queries: Query) -> tuple[Answer, str]:
        """Return the answers of the projection, and a sentence on their freshness. Errors: LedgerUnavailable."""
        written = await self._written()  # Before the projection is copied: events written meanwhile are not lag.
        answer = await self.projection.read(*queries)
        return answer, _freshness(answer, self.runtime.handle.ledger_id, written)

    async def named(self, user_ids: Iterable[str]) -> Callable[[str], str]:
        """Return a function that translates user ids on the ledger into plain ones, if they are known."""
        if not self.runtime.user_ids.is_hashed:
            return str
        known = await self.runtime.user_ids.plain(user_ids)
        return lambda kept: known.get(kept, kept)

    async def audit(self, work: Callable[[AuditReader], Awaitable[_T]]) -> _T:
        """Run `work` on archive and stream, and return its result. Errors: as `AuditReader.tables`; those of `work`."""
        handle, settings = self.runtime.handle, self.runtime.settings

        async def read() -> _T:
            redis = connect(find_redis_url(settings))
            reader = AuditReader(LedgerSource(handle.ledger_id, handle.keys, archive_of(settings), redis))
            try:
                return await work(reader)
            finally:
                reader.close()
                await redis.aclose()

        return await self.background.run(read)

    async def findings(self) -> list[Finding]:
        """Return the findings of `tollbook doctor`."""
        settings = self.runtime.settings
        return await self.background.run(lambda: examine(settings))

    async def _written(self) -> int | None:
        """Return how many events were ever written to the ledger; None if Redis does not answer."""
        ask, written = self.runtime.handle.pipeline.execute, 0
        try:
            for keys in self.runtime.handle.keys:
                removed, length = await asyncio.gather(ask("HGET", keys.meta, "removed"), ask("XLEN", keys.ledger))
                written += int(removed or 0) + int(length)
        except LedgerError:
            return None
        return written


def _freshness(answer: Answer, ledger_id: str, written: int | None) -> str:
    if answer.ledger_id != ledger_id:
        return "The projection is of another ledger: see the page Health."
    if written is None:
        return "Redis does not answer, so it is unknown whether this is up to date."
    behind = written - answer.seq
    if behind <= 0:
        return "Up to date with the ledger."
    return f"The projection is {behind:,} event{'' if behind == 1 else 's'} behind the ledger."


@asynccontextmanager
async def open_sources(runtime: InferenceRuntime, keys: ApiKeys) -> AsyncGenerator[Sources]:
    """Open the sources of a gateway's pages. Nothing is read before a page needs it."""
    sources = Sources(
        runtime,
        keys,
        Administration(runtime.ledger, runtime.policies, runtime.user_ids),
        Projection(runtime.settings.projection_path),
        Background(),
        Gatherer(runtime.settings),
    )
    try:
        yield sources
    finally:
        sources.background.close()
        await sources.projection.aclose()
        await sources.gatherer.aclose()
