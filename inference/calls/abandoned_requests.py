"""Requests that nobody waits for any more: their providers are asked what they cost, before the whole hold is assumed.

A cancelled stream is not free: what was generated is billed, also by providers that stop generating at once. The cost
may be known a moment later only, so it is asked for several times, within a few seconds.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from tollbook.inference.errors import ProviderError
from tollbook.inference.providers.client import ProviderClient

_PATIENCE_S: Final = 5.0
_PAUSES_S: Final = (0.25, 0.5, 1.0, 2.0)
"""Pauses before the second try and those after it."""
_log = structlog.get_logger(__name__)


async def told_cost(
    client: ProviderClient,
    generation_id: str,
    *,
    sleep: Callable[[float], Awaitable[None]],
    patience_s: float = _PATIENCE_S,
) -> int | None:
    """Return what an abandoned request cost, nano-dollars; None where the provider does not say in time.

    Errors: none of the provider's or the network's.
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
        # A RuntimeError: this process ends, and its connections are closed already.
        _log.warning("provider.cost_not_told", generation_id=generation_id, problem=str(exc) or "no answer in time")
    return None
