"""Access to each provider: its address, its dialect, and its key, which is only in the environment (G10)."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import SecretStr

from tollbook.inference.environment import read_variable
from tollbook.inference.errors import ProviderNotConfigured, SettingsError
from tollbook.inference.setting_addresses import check_api_key
from tollbook.inference.settings import Settings
from tollbook.schemas.policy import Dialect, Policy, ProviderRule
from tollbook.schemas.problems import unknown_name
from tollbook.schemas.routes import DEFAULT_PROVIDER

NO_DEFAULT_PROVIDER = (
    "no calls can be made: set OPENROUTER_API_KEY, or OPENROUTER_BASE_URL for another OpenAI-compatible server"
)


@dataclass(frozen=True, slots=True)
class ProviderAccess:
    """How to reach one provider.

    `asks_for_costs`: whether the provider is asked afterwards what a request has cost. `streams_replies`: whether
    replies are requested as event streams.
    """

    name: str
    base_url: str
    dialect: Dialect
    api_key: SecretStr | None = field(default=None, repr=False)
    asks_for_costs: bool = True
    streams_replies: bool = False
    key_env: str | None = None


def access_of(name: str, policy: Policy, settings: Settings) -> ProviderAccess:
    """Return how to reach a provider: the default one by the settings, others by the policy.

    Errors: ProviderNotConfigured if the policy has no such provider, or its key is not set or not valid.
    """
    if name == DEFAULT_PROVIDER:
        return ProviderAccess(
            name, settings.openrouter_base_url, settings.provider_dialect, settings.openrouter_api_key,
            streams_replies=settings.streams_replies, key_env="OPENROUTER_API_KEY",
        )  # fmt: skip
    rule = policy.providers.get(name)
    if rule is None:
        raise ProviderNotConfigured(unknown_name("provider", name, (DEFAULT_PROVIDER, *policy.providers)))
    return ProviderAccess(
        name,
        settings.url_of(rule),
        rule.dialect,
        None if settings.stand_in_url else _key_of(name, rule),  # G10
        asks_for_costs=rule.can_be_asked_for_costs,
        streams_replies=rule.streams_replies,
        key_env=rule.key_env,
    )


def _key_of(name: str, rule: ProviderRule) -> SecretStr | None:
    if rule.key_env is None:
        return None
    found = read_variable(rule.key_env)
    if found is None:
        raise ProviderNotConfigured(
            f"provider {name}: {rule.key_env} is not set; set this environment variable to the API key for "
            f"{rule.base_url}"
        )
    try:
        return check_api_key(SecretStr(found))
    except ValueError as exc:
        raise ProviderNotConfigured(f"provider {name}: {rule.key_env} {exc}") from None


def provider_problems(policy: Policy, settings: Settings, names: Iterable[str] | None = None) -> list[str]:
    """Return why providers cannot be called from this process: those in `names`, by default all of the routes."""
    problems: list[str] = []
    for name in policy.called_providers if names is None else dict.fromkeys(names):
        if name == DEFAULT_PROVIDER and not settings.has_provider:
            problems.append(NO_DEFAULT_PROVIDER)
        try:
            access_of(name, policy, settings)
        except (ProviderNotConfigured, SettingsError) as exc:
            problems.append(str(exc))
    return problems


def check_providers(policy: Policy, settings: Settings, names: Iterable[str] | None = None) -> None:
    """Check that providers can be called from this process. Errors: SettingsError, with a line for each problem."""
    problems = provider_problems(policy, settings, names)
    if problems:
        raise SettingsError(problems)
