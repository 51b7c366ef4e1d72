"""What requests have cost, asked of the provider that each was sent to.

A provider that does not answer, or refuses, is not asked again; the others are. Nothing here is charged.
"""

from tollbook.inference.errors import ProviderError, ProviderNotConfigured, SettingsError
from tollbook.inference.providers.clients import ProviderClients
from tollbook.schemas.policy import Policy
from tollbook.schemas.routes import DEFAULT_PROVIDER


class CostLookup:
    """Asks the providers that a policy describes. Make one for each run: it remembers who has failed."""

    def __init__(self, providers: ProviderClients, policy: Policy) -> None:
        self._providers = providers
        self._policy = policy
        self._failures: dict[str, ProviderError | SettingsError] = {}

    async def cost(self, provider: str | None, generation_id: str) -> int | None:
        """Return what a generation cost, nano-dollars; None where its provider does not tell, or cannot be asked.

        `provider` is its name as events have it, None for the default one.
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
        """Raise what kept a provider from being asked; nothing where all were.

        A provider that is not in the policy any more cannot be asked, which is no failure.
        Errors: ProviderUnavailable; ProviderRefused; SettingsError.
        """
        for failure in self._failures.values():
            if not isinstance(failure, ProviderNotConfigured):
                raise failure
