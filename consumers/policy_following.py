"""A worker follows the policy: streams that a later one adds are read within seconds, and so is their concurrency.

Calls hear of a change with their next reservation; a stream that nobody reads has none. So each worker looks at the
policy again and again. A stream that the policy has no more is read on until the worker ends: its tasks are answered.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.exceptions import RedisError

from tollbook.consumers.throttled_warning import ThrottledWarning
from tollbook.consumers.worker import Worker
from tollbook.inference.errors import SettingsError
from tollbook.inference.runtime import InferenceRuntime, now_ms
from tollbook.inference.stated_policy import concurrency_of
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.probe import check_permissions
from tollbook.ledger.stream_owners import own_streams, read_owners
from tollbook.schemas.policy import Policy

_EVERY_S: Final = 2.0
_log = structlog.get_logger(__name__)


class PolicyFollowing:
    """Brings a worker's streams and their concurrency up to the ledger's policy; `added` is set when there are more.

    A worker that was told its streams (not `takes_all`) keeps to them.
    """

    def __init__(
        self,
        runtime: InferenceRuntime,
        worker: Worker,
        *,
        takes_all: bool,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.added = asyncio.Event()
        self._runtime = runtime
        self._worker = worker
        self._takes_all = takes_all
        self._sleep = sleep
        self._followed: Policy | None = None
        self._warning = ThrottledWarning("worker.policy_not_followed", now_ms)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self.look()
            except (LedgerError, SettingsError, RedisError) as exc:
                # Another Tollbook has the stream, or the Redis user may not read it: the other streams are read on.
                self._warning.warn(exc)
            await self._sleep(_EVERY_S)

    async def look(self) -> None:
        """Follow the policy as it is now. Errors: LedgerUnavailable; StreamTaken; PermissionsMissing; SettingsError."""
        runtime, worker = self._runtime, self._worker
        await runtime.policies.refresh()
        # Another Tollbook may have come to this database since.
        worker.replies.share_database_with(await read_owners(runtime.handle.pipeline))
        policy = runtime.rules
        if policy is self._followed:
            return
        worker.set_concurrency(concurrency_of(runtime.settings, policy))
        new = [stream for stream in policy.streams if stream not in worker.claims.streams] if self._takes_all else []
        if new:
            await check_permissions(runtime.handle.pipeline, runtime.handle.keys, streams=new)
            owners = await own_streams(runtime.handle.pipeline, new, runtime.settings.namespace)
            worker.replies.share_database_with(owners)
            await worker.claims.add_streams(new)
            _log.info("worker.streams_added", worker=worker.name, streams=new)
            self.added.set()
        self._followed = policy
