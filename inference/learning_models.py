"""Asking the providers for their models and prices: at a process's start, every hour, and for each new policy."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.errors import ProviderError, SettingsError
from tollbook.inference.models import ModelCatalogue
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.tokenizers import load_tokenizers
from tollbook.ledger.logs import LazyLogger
from tollbook.schemas.routes import DEFAULT_PROVIDER

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

_REFRESH_S: Final = 3600.0
# How long a process waits for the first answers. Calls do not need them: unknown facts are not checked.
_FIRST_ANSWER_S: Final = 2.0
_log = LazyLogger(__name__)


@asynccontextmanager
async def learning_models(
    policies: CurrentPolicy, providers: ProviderClients, settings: "Settings", *, now_ms: Callable[[], int]
) -> AsyncGenerator[None]:
    """Keep the catalogues of the providers up to date until the context ends.

    The providers named by the routes of the policy in force are asked. If one does not answer, its catalogue stays.
    """
    is_first_over = asyncio.Event()

    async def learn() -> None:
        while True:
            try:
                await learn_all(policies, providers, settings, now_ms=now_ms)
            finally:
                is_first_over.set()
            if any(in_force.at(name).models.has_public_ids for in_force, name in _called(policies)):
                await asyncio.to_thread(load_tokenizers)  # Until they are loaded, bytes are the bound.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S):
                    await policies.wait_for_change()  # The new policy may name another provider.

    learning = asyncio.create_task(learn())
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_ANSWER_S):
                await is_first_over.wait()
        yield
    finally:
        learning.cancel()
        await asyncio.wait({learning})


def _called(policies: CurrentPolicy) -> list[tuple[PriceCatalogue, str]]:
    in_force = policies.newest
    return [(in_force.prices, name) for name in in_force.policy.called_providers]


async def learn_all(
    policies: CurrentPolicy, providers: ProviderClients, settings: "Settings", *, now_ms: Callable[[], int]
) -> None:
    """Ask all providers that routes name at the same time. Errors of the providers are logged, not raised."""

    async def learn(name: str) -> None:
        in_force = policies.newest
        try:
            client = providers.at(name, in_force.policy)
            await learn_models(in_force.prices.at(name).models, client, now_ms=now_ms)
        except (ProviderError, SettingsError) as exc:
            _log.debug("models.not_learnt", provider=name, problem=str(exc))

    names = policies.newest.policy.called_providers
    await asyncio.gather(*(learn(name) for name in names if name != DEFAULT_PROVIDER or settings.has_provider))


async def learn_models(models: ModelCatalogue, provider: ProviderClient, *, now_ms: Callable[[], int]) -> None:
    """Ask the provider once for its models and prices. Errors: ProviderError."""
    found = await provider.models()
    models.learn(found)
    pricing = {model: facts.pricing for model, facts in found.items() if facts.pricing is not None}
    await asyncio.to_thread(models.price_lists.add, pricing, now_ms())
