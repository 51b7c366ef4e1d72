"""Asking a provider for the cost of an abandoned request, before the whole hold is assumed.

A cancelled stream is not free: providers bill what was generated, even if they stop at once. The cost may be known only
a moment later, so it is asked for several times within a few seconds.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from tollbook.inference.errors import ProviderError
from tollbook.inference.providers.client import ProviderClient

_PATIENCE_S: Final = 5.0
_PAUSES_S: Final = (0.25, 0.5, 1.0, 2.0)
"""The pause before each retry."""
_log = structlog.get_logger(__name__)


async def ask_abandoned_cost(
    client: ProviderClient,
    generation_id: str,
    *,
    sleep: Callable[[float], Awaitable[None]],
    patience_s: float = _PATIENCE_S,
) -> int | None:
    """Return what an abandoned request cost, in nano-dollars; None if the provider does not say in time.

    Failures of the provider or the network give None, no error.
    """
    if not client.can_be_asked:
        return None
    try:
        async with asyncio.timeout(patience_s):
            for pause_s in (*_PAUSES_S, None):
                cost = await client.generation(generation_id)
                if cost is not None or pause_s is None:
                    return cost
                await sleep(pause_s)
    except (ProviderError, TimeoutError, RuntimeError) as exc:
        # RuntimeError: this process is ending, and its connections are already closed.
        _log.warning("provider.cost_not_told", generation_id=generation_id, problem=str(exc) or "no answer in time")
    return None
