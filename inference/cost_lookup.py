"""Asking providers what past requests have cost.

After a failure, a provider is not asked again; the other providers still are. These questions are free.
"""

from tollbook.inference.errors import ProviderError, ProviderNotConfigured, SettingsError
from tollbook.inference.providers.clients import ProviderClients
from tollbook.schemas.policy import Policy
from tollbook.schemas.routes import DEFAULT_PROVIDER


class CostLookup:
    """Asks the providers of a policy. Make a new one for each run: it remembers which providers have failed."""

    def __init__(self, providers: ProviderClients, policy: Policy) -> None:
        self._providers = providers
        self._policy = policy
        self._failures: dict[str, ProviderError | SettingsError] = {}

    async def cost(self, provider: str | None, generation_id: str) -> int | None:
        """Return what a generation cost, in nano-dollars; None if its provider does not say, or cannot be asked.

        `provider` is the provider's name as in events, None for the default one.
        """
        name = provider or DEFAULT_PROVIDER
        if name in self._failures:
            return None
        try:
            return await self._providers.at(name, self._policy).generation(generation_id)
        except (ProviderError, SettingsError) as exc:
            self._failures[name] = exc
            return None

    def raise_failure(self) -> None:
        """Raise the first failure of a provider, if there was one.

        A provider that the policy no longer has cannot be asked; that is no failure.
        Errors: ProviderUnavailable; ProviderRefused; SettingsError.
        """
        for failure in self._failures.values():
            if not isinstance(failure, ProviderNotConfigured):
                raise failure
