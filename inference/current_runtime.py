"""The current runtime of an application: its clients and services find it by themselves.

    async with connect_runtime():
        result = await InferenceClient("generate_draft").call("Write ...", user_id="u42")

Invariant: a runtime belongs to one event loop, and is closed when its `async with` ends.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Final

from tollbook.inference.address import find_redis_url
from tollbook.inference.on_demand import OnDemand
from tollbook.inference.runtime import InferenceRuntime, open_ledger, open_runtime
from tollbook.inference.settings import Settings, given_or_loaded
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.refusals import translating_redis_errors

_current: ContextVar[OnDemand[InferenceRuntime] | None] = ContextVar("inference_runtime", default=None)
# A web server runs an application's start and each request in separate contexts. So a request does not see a context
# variable set at the start; it gets the runtime that was opened last on its event loop.
_opened: Final[dict[asyncio.AbstractEventLoop, list[OnDemand[InferenceRuntime]]]] = {}


@asynccontextmanager
async def connect_runtime(settings: Settings | None = None) -> AsyncGenerator[OnDemand[InferenceRuntime]]:
    """Let the clients and services inside use the running system.

    Redis is found by the settings (environment or `.env`), or by the file that `tollbook up` wrote to the data
    directory. The first call connects; if that fails, each later call tries again. The projector is asked over Redis,
    wherever it runs. So an application can start without both; its calls raise LedgerUnavailable meanwhile.

    Errors: SettingsError.
    """
    settings = given_or_loaded(settings)

    async def open_connected(stack: AsyncExitStack) -> InferenceRuntime:
        redis_url = find_redis_url(settings)
        with translating_redis_errors():
            handle = await stack.enter_async_context(open_ledger(settings, redis_url, may_create=False))
            return await stack.enter_async_context(open_runtime(settings, handle))

    runtime = OnDemand(open_connected)
    try:
        with _as_current(runtime):
            yield runtime
    finally:
        await runtime.aclose()


async def current_runtime() -> InferenceRuntime:
    """Return the runtime of the surrounding `connect_runtime`, or else of the one at the application's start.

    Errors: LedgerUnavailable, also if none was opened; LedgerRefused; SettingsError.
    """
    opened = _opened.get(asyncio.get_running_loop(), [])
    runtime = _current.get()
    if runtime not in opened:
        runtime = opened[-1] if opened else None
    if runtime is None:
        raise LedgerUnavailable("no runtime is open: use `async with connect_runtime():` around the calls")
    return await runtime.get()


@asynccontextmanager
async def using_runtime(runtime: InferenceRuntime | None = None) -> AsyncGenerator[InferenceRuntime]:
    """Yield the given runtime, else the current one; a Redis error inside becomes LedgerUnavailable.

    Errors: as `current_runtime`.
    """
    runtime = runtime or await current_runtime()
    with translating_redis_errors():
        yield runtime


@contextmanager
def _as_current(runtime: OnDemand[InferenceRuntime]) -> Generator[None]:
    loop, before = asyncio.get_running_loop(), _current.get()
    _opened.setdefault(loop, []).append(runtime)
    _current.set(runtime)
    try:
        yield
    finally:
        # Not by a token: this may run in another context than the `set`.
        _current.set(before)
        _opened[loop].remove(runtime)
        if not _opened[loop]:
            del _opened[loop]
