"""Following the policy: a worker reads new streams, and uses new concurrency settings, within seconds of a change.

Calls see a new policy at their next reservation, but a stream that nobody reads has no calls. So each worker polls the
policy. A stream that was removed from the policy is still read until the worker ends, so that its tasks are answered.
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
    """Updates a worker's streams and their concurrency from the ledger's policy; `added` is set when streams are added.

    Without `takes_all`, the worker keeps the streams that it was started with.
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
                # Another Tollbook has the stream, or the Redis user may not read it. The other streams are still read.
                self._warning.warn(exc)
            await self._sleep(_EVERY_S)

    async def look(self) -> None:
        """Apply the policy in force. Errors: LedgerUnavailable; StreamTaken; PermissionsMissing; SettingsError."""
        runtime, worker = self._runtime, self._worker
        await runtime.policies.refresh()
        # Another Tollbook may have started to use this database since.
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
