"""The clients of several providers: one for each as the policy describes it, closed at the end and not before."""

from pathlib import Path
from typing import Any

import pytest

from tollbook.inference.errors import ProviderNotConfigured, SettingsError
from tollbook.inference.provider_access import access_of, check_providers
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.settings import Settings, load_settings
from tollbook.schemas.policy import Policy, default_policy

KEY = "sk-one"


def policy(**rule: Any) -> Policy:
    described = {"base_url": "https://one.test/v1", "key_env": "TEST_KEY", "dialect": "openai", **rule}
    task = {"provider": "one", "model": "m", "max_tokens": 9}
    return default_policy({"providers": {"one": described}, "tasks": {"own": task}})


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_KEY", KEY)
    return load_settings(env_file=None, openrouter_api_key="sk-or")


async def test_a_client_is_used_until_the_policy_changes_its_provider(settings: Settings) -> None:
    async with ProviderClients.from_settings(settings) as clients:
        first = clients.at("one", policy())
        assert clients.at("one", policy()) is first
        assert clients.at("default", policy()) is clients.default
        moved = clients.at("one", policy(base_url="https://two.test/v1"))
        assert moved is not first
        assert "two.test" in repr(moved)


async def test_what_the_policy_does_not_have_cannot_be_called(settings: Settings) -> None:
    async with ProviderClients.from_settings(settings) as clients:
        with pytest.raises(ProviderNotConfigured, match=r"unknown provider 'on'; did you mean 'one'\?"):
            clients.at("on", policy())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            None,
            "provider one: TEST_KEY is not set; set this environment variable to the API key for https://one.test/v1",
        ),
        ("", "provider one: TEST_KEY is not set; set this"),
        ("two words", "provider one: TEST_KEY must be 1 to 1000 printable ASCII characters"),
    ],
)
async def test_a_malformed_key_is_named_by_its_variable(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, value: str | None, problem: str
) -> None:
    if value is None:
        monkeypatch.delenv("TEST_KEY")
    else:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(SettingsError) as refused:
        check_providers(policy(), settings)
    (line,) = refused.value.problems
    assert line.startswith(problem)
    assert "two words" not in line


def test_a_key_may_stand_in_the_env_file(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY")
    Path(".env").write_text(f"TEST_KEY={KEY}\n")
    access = access_of("one", policy(), settings)
    assert access.api_key is not None
    assert access.api_key.get_secret_value() == KEY
    assert KEY not in repr(access), "G10"


def test_only_what_routes_name_is_needed(settings: Settings) -> None:
    without_key = settings.model_copy(update={"openrouter_api_key": None})
    with pytest.raises(SettingsError, match="OPENROUTER_API_KEY"):
        check_providers(policy(), without_key)
    check_providers(policy(), without_key, ["one"])
    unused = default_policy(
        {"providers": {"two": {"base_url": "https://x.test", "dialect": "openai", "key_env": "NO"}}}
    )
    check_providers(unused, settings)


def test_a_stand_in_is_called_in_place_of_a_provider_and_gets_no_key(settings: Settings) -> None:
    """G10."""
    tried = settings.model_copy(update={"stand_in_url": "http://127.0.0.1:8787"})
    access = access_of("one", policy(), tried)
    assert (access.base_url, access.api_key) == ("http://127.0.0.1:8787/openai/v1", None)
