"""Asks the provider for its models and prices while a process makes calls: at its start, and again every hour."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final

from tollbook.inference.errors import ProviderError
from tollbook.inference.models import ModelCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.tokenizers import load_tokenizers
from tollbook.ledger.logs import LazyLogger

_REFRESH_S: Final = 3600.0
# How long a process waits for the first answer. Calls do not need it: what is not known is not checked.
_FIRST_ANSWER_S: Final = 2.0
_log = LazyLogger(__name__)


@asynccontextmanager
async def learning_models(
    models: ModelCatalogue, provider: ProviderClient, *, now_ms: Callable[[], int], is_asked: bool = True
) -> AsyncGenerator[None]:
    """Keep a catalogue up to date until the end; a provider that does not answer leaves it as it is."""
    if not is_asked:
        yield
        return
    is_first_over = asyncio.Event()

    async def learn() -> None:
        while True:
            try:
                await learn_models(models, provider, now_ms=now_ms)
            except ProviderError as exc:
                _log.debug("models.not_learnt", problem=str(exc))
            finally:
                is_first_over.set()
            await asyncio.sleep(_REFRESH_S)

    # Until they are there, bytes are the bound.
    loading = asyncio.create_task(asyncio.to_thread(load_tokenizers)) if models.has_public_ids else None
    learning = asyncio.create_task(learn())
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_ANSWER_S):
                await is_first_over.wait()
        yield
    finally:
        learning.cancel()
        await asyncio.wait({learning, *([loading] if loading else [])})


async def learn_models(models: ModelCatalogue, provider: ProviderClient, *, now_ms: Callable[[], int]) -> None:
    """Ask once what the provider offers, and at which prices. Errors: ProviderError."""
    found = await provider.models()
    models.learn(found)
    pricing = {model: facts.pricing for model, facts in found.items() if facts.pricing is not None}
    await asyncio.to_thread(models.price_lists.add, pricing, now_ms())
