"""The clients of all providers: the default provider's, and those of the policy's, each made at its first use.

Each provider has its own connections, timeouts and pauses: the faults of one provider do not affect the others.
"""

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tollbook.inference.provider_access import access_of
from tollbook.inference.providers.client import ProviderClient
from tollbook.schemas.policy import Policy, ProviderRule
from tollbook.schemas.routes import DEFAULT_PROVIDER

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

MakeClient = Callable[[str, Policy], ProviderClient]
"""Makes the client of a provider of a policy. Errors: ProviderNotConfigured."""


def _only_default(name: str, policy: Policy) -> ProviderClient:
    raise AssertionError(f"there is only the default provider, not {name} of {len(policy.providers)}")


class ProviderClients:
    """Keeps a client for each provider. Use it as an async context manager, or close it."""

    def __init__(self, default: ProviderClient, make: MakeClient = _only_default) -> None:
        """`default` is the client of the default provider; `make` makes the others."""
        self.default = default
        self._make = make
        self._others: dict[str, tuple[ProviderRule | None, ProviderClient]] = {}
        self._replaced: list[ProviderClient] = []

    @classmethod
    def from_settings(cls, settings: "Settings") -> Self:
        """Make the clients by the settings and the policy."""

        def make(name: str, policy: Policy) -> ProviderClient:
            access = access_of(name, policy, settings)
            return ProviderClient.from_access(access, settings)

        return cls(ProviderClient.from_settings(settings), make)

    def at(self, name: str, policy: Policy) -> ProviderClient:
        """Return the client of a provider by a policy.

        Errors: ProviderNotConfigured if the policy has no such provider, or its key is not set.
        """
        if name == DEFAULT_PROVIDER:
            return self.default
        rule = policy.providers.get(name)
        known = self._others.get(name)
        if known is not None and known[0] == rule:
            return known[1]
        made = self._make(name, policy)
        if known is not None:
            self._replaced.append(known[1])  # Calls may be in flight on this client, so it is closed only at the end.
        self._others[name] = (rule, made)
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for client in (self.default, *(client for _, client in self._others.values()), *self._replaced):
            await client.aclose()
