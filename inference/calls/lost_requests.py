"""Asking a provider for the cost of a dead worker's request, before the whole hold is assumed.

The wait is short: a provider that does not answer in time is not asked again for a while, and `reconcile` asks for the
cost later.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.errors import ProviderError, SettingsError
from tollbook.inference.providers.clients import ProviderClients
from tollbook.ledger.gate.requests import OpenCall
from tollbook.schemas.routes import DEFAULT_PROVIDER

AskCost = Callable[[str, OpenCall], Awaitable[int | None]]
"""Returns what the request of a dead run cost, in nano-dollars, or None if unknown; takes the user id and the hold."""
_ANSWER_TIMEOUT_S: Final = 3.0
_PAUSE_S: Final = 30.0
_log = structlog.get_logger(__name__)


async def cost_unknown(_user_id: str, _found: OpenCall) -> int | None:
    """Return None, without asking a provider."""
    return None


class LostRequests:
    """Asks the providers. After a failure, a provider is not asked for half a minute by the clock `monotonic`."""

    def __init__(
        self,
        providers: ProviderClients,
        policies: CurrentPolicy,
        *,
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._providers = providers
        self._policies = policies
        self._answer_timeout_s = answer_timeout_s
        self._monotonic = monotonic
        self._paused_until_s: dict[str, float] = {}

    async def cost(self, user_id: str, found: OpenCall) -> int | None:
        """Return what the request in flight of an open hold cost; None if its id or its cost is not known.

        Failures of the provider or the network give None, no error.
        """
        if not found.may_be_under_way or found.generation_id is None:
            return None
        provider = found.provider or DEFAULT_PROVIDER
        if self._paused_until_s.get(provider, 0.0) > self._monotonic():
            return None
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                client = self._providers.at(provider, self._policies.of(user_id).policy)
                cost = await client.generation(found.generation_id)
        except (ProviderError, SettingsError, TimeoutError) as exc:
            self._paused_until_s[provider] = self._monotonic() + _PAUSE_S
            _log.warning("provider.cost_not_told", provider=provider, problem=str(exc) or "no answer in time")
            return None
        return cost
