"""What is known of models: from the provider's list, and of families without one."""

from typing import Any

import pytest

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.images import image_tokens_at_most
from tollbook.inference.models import ModelCatalogue, ModelFacts, facts_of
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.schemas.policy import ProviderRule

LISTED = ModelCatalogue(
    {
        "a/all": ModelFacts(
            supported_parameters=frozenset({"max_tokens", "temperature", "seed", "tools", "reasoning"})
        ),
        "a/few": ModelFacts(supported_parameters=frozenset({"max_completion_tokens", "tools"})),
        "a/silent": ModelFacts(),
    }
)


@pytest.mark.parametrize(
    ("model", "names", "unsupported"),
    [
        ("a/all", ["seed", "temperature", "reasoning_effort", "parallel_tool_calls"], []),
        ("a/few", ["seed", "tools", "functions", "reasoning_effort"], ["seed", "reasoning_effort"]),
        ("a/few", ["min_p", "store", "cache_control"], []),  # Listed for no model at all.
        ("a/silent", ["seed"], []),
        ("a/unlisted", ["seed"], []),
    ],
)
def test_a_parameter_is_judged_by_the_providers_list(model: str, names: list[str], unsupported: list[str]) -> None:
    assert LISTED.unsupported(model, names) == unsupported


def test_openai_itself_does_not_know_what_others_added() -> None:
    assert ModelCatalogue(dialect="openai").unsupported("gpt-4o", ["top_k", "seed", "min_p"]) == ["top_k", "min_p"]


@pytest.mark.parametrize(
    ("catalogue", "model", "name"),
    [
        (LISTED, "a/all", "max_tokens"),
        (LISTED, "a/few", "max_completion_tokens"),
        (ModelCatalogue(), "openai/gpt-5-mini", "max_completion_tokens"),
        (ModelCatalogue(), "o3-mini", "max_completion_tokens"),
        (ModelCatalogue(), "openai/gpt-4o-mini", "max_tokens"),
        (ModelCatalogue(), "llama-3.1-8b", "max_tokens"),
        (ModelCatalogue(dialect="openai"), "gpt-4o-mini", "max_completion_tokens"),
    ],
)
def test_the_limit_has_the_name_that_the_model_takes(catalogue: ModelCatalogue, model: str, name: str) -> None:
    """G1: a limit that is not obeyed bounds nothing."""
    assert catalogue.limit_name(model) == name


@pytest.mark.parametrize(
    ("model", "is_sent"),
    [
        ("openai/gpt-4o-mini", True), ("anthropic/claude-sonnet-4", True), ("anthropic/claude-3-haiku", True),
        ("anthropic/claude-3-5-sonnet", True), ("claude-opus-4-20250514", True), ("openai/gpt-5-chat", True),
        ("openai/gpt-5-mini", False), ("o4-mini", False), ("anthropic/claude-opus-4.7", False),
        ("claude-opus-4-8", False), ("anthropic/claude-sonnet-5", False), ("anthropic/claude-haiku-5.5", False),
    ],
)  # fmt: skip
def test_a_routes_temperature_is_not_sent_to_a_model_that_refuses_it(model: str, is_sent: bool) -> None:
    assert ModelCatalogue().without_unsupported(model, {"temperature": 0.2}) == (
        {"temperature": 0.2} if is_sent else {}
    )


@pytest.mark.parametrize(
    ("listed", "facts"),
    [
        ({"id": "m"}, ModelFacts()),
        ({"context_length": 10, "top_provider": {"context_length": 20}}, ModelFacts(context_length=20)),
        ({"context_length": True, "top_provider": None, "architecture": 7}, ModelFacts()),
        ({"context_length": -1, "supported_parameters": "all"}, ModelFacts()),
        ({"supported_parameters": []}, ModelFacts()),
        ({"supported_parameters": ["seed", 7]}, ModelFacts(supported_parameters=frozenset({"seed"}))),
        (
            {"architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]}},
            ModelFacts(input_modalities=frozenset({"text", "image"}), output_modalities=frozenset({"text"})),
        ),
    ],
)
def test_an_entry_of_models_is_read_or_says_nothing(listed: dict[str, Any], facts: ModelFacts) -> None:
    assert facts_of(listed) == facts


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("openai/gpt-4o", 85 + 8 * 170),
        ("gpt-4o-2024-08-06", 85 + 8 * 170),
        ("openai/gpt-4o-mini", 2_833 + 8 * 5_667),
        ("openai/gpt-4.1", 85 + 8 * 170),
        ("openai/gpt-4.1-mini", 2_489),
        ("openai/gpt-5", 70 + 8 * 140),
        ("openai/gpt-5-nano", 3_779),
        ("o3-2025-04-16", 75 + 8 * 150),
        ("anthropic/claude-3-haiku", 2_048),
        ("anthropic/claude-3.5-sonnet", 2_048),
        ("claude-3-5-sonnet-20241022", 2_048),
        ("anthropic/claude-sonnet-4", 2_048),
        ("claude-sonnet-4-20250514", 2_048),
        ("anthropic/claude-opus-4.6", 2_048),
        ("anthropic/claude-opus-4.7", 5_120),
        ("anthropic/claude-sonnet-5", 5_120),
        ("google/gemini-2.5-flash", 16 * 258),
        ("google/gemini-2.5-flash-lite", 16 * 258),
        ("google/gemini-3-pro-preview", 2_240),
        ("x-ai/grok-4", 1_792),
    ],
)
def test_an_image_has_at_most_what_the_provider_publishes(model: str, tokens: int) -> None:
    assert image_tokens_at_most(model) == tokens


@pytest.mark.parametrize(
    "model",
    ["openai/gpt-6", "my/model", "openai/gpt-5.9", "anthropic/claude-6-opus", "google/gemini-4-pro", "gpt-4o-mini-tts",
     "openai/gpt-5.4-mini", "anthropic/claude-opus-5.6"],
)  # fmt: skip
def test_an_image_to_a_model_that_is_not_listed_has_no_bound(model: str) -> None:
    """G8."""
    with pytest.raises(PriceUnknown, match="how many tokens an image can have is not known"):
        image_tokens_at_most(model)


@pytest.mark.parametrize(
    ("parameters", "unsupported"),
    [
        ({"temperature": 1.0, "top_p": 0.5, "top_k": 5, "stop": "x", "tools": []}, []),
        ({"temperature": 1.1, "seed": 7}, ["temperature", "seed"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, []),
        (
            {"frequency_penalty": 1, "logprobs": True, "verbosity": "low"},
            ["frequency_penalty", "logprobs", "verbosity"],
        ),
    ],
)
def test_parameters_that_anthropic_lacks_are_refused(parameters: dict[str, Any], unsupported: list[str]) -> None:
    models = ModelCatalogue(dialect="anthropic")
    assert models.unsupported("claude-haiku-4-5", parameters) == unsupported
    assert models.without_unsupported("claude-haiku-4-5", parameters) == {
        name: value for name, value in parameters.items() if name not in unsupported
    }
    assert models.limit_name("claude-opus-5") == "max_tokens"


def test_anthropics_list_says_how_much_a_model_reads() -> None:
    listed = {"data": [{"id": "claude-a", "max_input_tokens": 200_000}, {"id": "claude-b"}, {"type": "model"}]}
    found = ADAPTERS["anthropic"].read_models(listed)
    assert {name: facts.context_length for name, facts in found.items()} == {"claude-a": 200_000, "claude-b": None}
    for wrong in ({}, [], {"data": None}, {"data": {"id": "x"}}):
        with pytest.raises(ValueError, match="cannot be read"):
            ADAPTERS["anthropic"].read_models(wrong)


def test_each_provider_has_a_catalogue_of_its_own() -> None:
    models = ModelCatalogue()
    one, same, other = (
        ProviderRule.model_validate({"base_url": f"https://{name}.test/v1", "dialect": "openai", **prices})
        for name, prices in (("one", {}), ("one", {"prices": {"m": {"prompt": 1, "completion": 2}}}), ("two", {}))
    )
    assert models.at("a", one) is models.at("a", same)
    assert models.at("a", one) is not models.at("a", other)
    assert models.at("a", one) is not models.at("b", one)
