"""Routes: the documented defaults, overrides, and their check against the prices."""

from decimal import Decimal

import pytest

from tollbook.inference.errors import SettingsError
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.routing import COST_CAPS, MODEL_ROUTING, routing_with, unpriced_routes

NOVEMBER_2026_MS = 1_795_000_000_000


@pytest.mark.parametrize(
    ("task_type", "model", "fallback", "max_tokens", "temperature"),
    [
        ("classify_archetype", "anthropic/claude-3-haiku", "google/gemini-2.5-flash", 200, 0.1),
        ("generate_draft", "anthropic/claude-sonnet-4", "openai/gpt-4o-mini", 2000, 0.7),
        ("score_post", "anthropic/claude-3-haiku", "google/gemini-2.5-flash", 500, 0.0),
        ("extract_patterns", "anthropic/claude-3-haiku", "google/gemini-2.5-flash", 1000, 0.2),
    ],
)
def test_default_routes_are_the_documented_ones(
    task_type: str, model: str, fallback: str, max_tokens: int, temperature: float
) -> None:
    route = MODEL_ROUTING[task_type]
    assert (route.model, route.fallback, route.max_tokens, route.temperature) == (
        model, (fallback,), max_tokens, temperature,
    )  # fmt: skip


def test_ping_has_no_route() -> None:
    assert "ping" not in MODEL_ROUTING


def test_cost_caps_are_dollars_by_plan() -> None:
    assert dict(COST_CAPS) == {"trial": Decimal(5), "starter": Decimal(15), "growth": Decimal(40)}
    assert [str(cap) for cap in COST_CAPS.values()] == ["5.00", "15.00", "40.00"]


def test_override_replaces_the_named_fields_only_and_knows_short_names() -> None:
    routing = routing_with({"generate_draft": {"model": "gpt-4o-mini", "fallback": None}})
    route = routing["generate_draft"]
    assert (route.model, route.fallback, route.max_tokens) == ("openai/gpt-4o-mini", (), 2000)
    assert routing["score_post"] == MODEL_ROUTING["score_post"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            {"generate_drafts": {}},
            "unknown task type 'generate_drafts'; did you mean 'generate_draft'? Known: classify_archetype",
        ),
        ({"ping": {"model": "x"}}, "'ping' calls no model and has no route"),
        ({"score_post": {"max_token": 5}}, "unknown field 'max_token' in 'score_post'; did you mean 'max_tokens'?"),
        ({"score_post": {"max_tokens": 0}}, "'score_post.max_tokens' must be a whole number from 1 to 200000, not 0"),
        ({"score_post": {"temperature": 3}}, "'score_post.temperature' must be a number from 0 to 2, not 3"),
        ({"score_post": {"model": "two words"}}, "'score_post.model' must be a model id such as"),
        ({"score_post": {"model": None}}, "'score_post.model' must be a model id such as"),
        (
            {"score_post": {"model": "gemini-flash"}},
            "'score_post': the fallback is the model itself, google/gemini-2.5-flash",
        ),
        ({"score_post": {"model": "a/b", "fallback": "a/b"}}, "'score_post': the fallback is the model itself, a/b"),
    ],
)
def test_wrong_override_is_named(overrides: dict[str, dict[str, object]], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        routing_with(overrides)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]


def test_every_problem_of_the_overrides_is_listed() -> None:
    with pytest.raises(SettingsError) as caught:
        routing_with({"x": {}, "score_post": {"max_tokens": 0, "temperature": 9}})
    assert len(caught.value.problems) == 3


def test_default_routes_are_priced() -> None:
    assert unpriced_routes(MODEL_ROUTING, PriceCatalogue(), NOVEMBER_2026_MS) == []


def test_unpriced_model_of_a_route_is_named() -> None:
    routing = routing_with({"score_post": {"fallback": "acme/unheard-of"}})
    assert unpriced_routes(routing, PriceCatalogue(), NOVEMBER_2026_MS) == [
        "score_post: no price is known for its fallback acme/unheard-of"
    ]


def test_larger_limit_of_a_second_try_is_configured_on_the_route() -> None:
    routes = routing_with({"generate_draft": {"retry_max_tokens": 6_000}})
    assert routes["generate_draft"].retry_max_tokens == 6_000
    assert all(route.retry_max_tokens is None for route in MODEL_ROUTING.values())
    with pytest.raises(SettingsError, match="retry_max_tokens must be above max_tokens"):
        routing_with({"generate_draft": {"retry_max_tokens": 2_000}})
