"""Gathers the figures of the live view from Redis and from a copy of the projection.

It does not slow the running system (see `redis_reader` and `projection_reader`). A part that cannot be read raises no
error: the figures have the problem, next to the last known values.
"""

import time
from dataclasses import dataclass, replace

from tollbook.inference.settings import Settings
from tollbook.ledger.clock import now_ms
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.server.endpoint import read_endpoint
from tollbook.views.top.figures import Figures, Problem, SpendFigures, UserFigures
from tollbook.views.top.problems import find_problems
from tollbook.views.top.projection_reader import Copy, ProjectionReader
from tollbook.views.top.redis_reader import RedisReader, Seen
from tollbook.views.top.spend import update_spend


@dataclass(frozen=True, slots=True)
class _Lag:
    """How far the fold was behind when a copy was made; None if unknown."""

    at_s: float
    events: int | None
    seconds: float | None


class Gatherer:
    """Gathers the figures of one system repeatedly, until `aclose`.

    If the server restarts at another address, it is found again by the settings and the data directory.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis = RedisReader(settings)
        self._projection = ProjectionReader(settings.projection_path)
        self._seen: Seen | None = None
        self._lag = _Lag(-1.0, None, None)

    async def check(self) -> None:
        """Check that there is a system to watch, or one that starts.

        Errors: LedgerUnavailable if there is neither a running system, nor a ledger, nor a projection.
        """
        if self._projection.path.exists() or read_endpoint(self._settings.data_dir) is not None:
            return
        self._seen = await self._redis.look()

    async def gather(self, *, must_copy: bool = False) -> Figures:
        """Read everything once. With `must_copy`, wait for the copy of the projection without a timeout."""
        problem: Problem | None = None
        try:
            self._seen = await self._redis.look()
        except LedgerError as exc:
            problem = Problem("person", str(exc))
        seen = self._seen
        at_ms = now_ms() if problem or seen is None else seen.now_ms
        copy = await self._projection.read(self._redis.calendar.month_at(at_ms).name, seen, must_copy=must_copy)
        now_s = time.monotonic()
        figures = Figures(
            at_ms=at_ms,
            namespace=self._settings.namespace,
            data_dir=str(self._settings.data_dir.resolve()),
            problems=(),
            redis=None if seen is None else replace(seen.redis, age_s=now_s - seen.at_s),
            rates=None if seen is None else replace(seen.rates, age_s=now_s - seen.at_s),
            spend=None if copy is None else await self._named(await self._spend(copy, seen, now_s)),
        )
        problems = [] if problem is None else [problem]
        if self._projection.problem is not None:
            problems.append(Problem("person", self._projection.problem))
        return replace(figures, problems=(*problems, *find_problems(figures, is_answered=problem is None)))

    async def aclose(self) -> None:
        """Close the connection to Redis; wait for a running copy first, which removes its own folder."""
        await self._projection.aclose()
        await self._redis.aclose()

    async def _spend(self, copy: Copy, seen: Seen | None, now_s: float) -> SpendFigures:
        if self._lag.at_s != copy.at_s:
            self._lag = await self._measure_lag(copy)
        lag = self._lag
        spend = replace(copy.spend, age_s=now_s - copy.at_s, lag_events=lag.events, lag_s=lag.seconds)
        if seen is None or seen.redis.ledger_id != spend.ledger_id:
            return spend
        moves = self._redis.moves_after({partition: position.seq for partition, position in copy.positions.items()})
        return spend if moves is None else update_spend(spend, moves, events=max(0, seen.redis.seq - spend.seq))

    async def _named(self, spend: SpendFigures) -> SpendFigures:
        """Return spend with plain user ids, if the ledger has hashes and the table beside it knows these users."""
        plain = await self._redis.plain_ids(user.user_id for user in (*spend.by_spend, *spend.by_use))

        def named(users: tuple[UserFigures, ...]) -> tuple[UserFigures, ...]:
            return tuple(replace(user, user_id=plain.get(user.user_id, user.user_id)) for user in users)

        return replace(spend, by_spend=named(spend.by_spend), by_use=named(spend.by_use)) if plain else spend

    async def _measure_lag(self, copy: Copy) -> "_Lag":
        """Return how far the copy is behind the ledger, as Redis reported it right before."""
        seen, positions = copy.seen, copy.positions
        if seen is None or seen.redis.ledger_id != copy.spend.ledger_id:
            return _Lag(copy.at_s, None, None)
        behind = {number: seq - positions[number].seq for number, seq in seen.seqs.items() if number in positions}
        events = sum(max(0, number) for number in behind.values())
        if not events:
            return _Lag(copy.at_s, 0, 0.0)
        waiting = {number: positions[number] for number, by in behind.items() if by > 0}
        oldest_ms = await self._redis.oldest_after(waiting)
        seconds = None if oldest_ms is None else max(0.0, (seen.now_ms - oldest_ms) / 1000)
        return _Lag(copy.at_s, events, seconds)
