"""Several providers in one policy, each with a stand-in of its own: routes, fallbacks across them, caps, costs."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT, PROMPT_BOUND, PROMPT_TOKENS, Calling, SingleTry, open_calling
from tests.quick import first_quick
from tests.servers import wait_until
from tests.two_providers import TWO_PROVIDERS, addresses_of
from tollbook.inference.cost_lookup import CostLookup
from tollbook.inference.learning_models import learn_all
from tollbook.inference.policy_changes import apply_policy
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.reconcile import reconcile
from tollbook.inference.runtime import build_gates, now_ms
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import BudgetReserved, FallbackUsed, ModelCalled
from tollbook.schemas.money import nanousd_from_usd
from tollbook.schemas.policy import Policy
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.standin import FaultPlan, StandIn, StandInConfig

OPENAI_KEY, CLAUDE_KEY = "sk-openai-secret", "sk-ant-secret"
MINI, HAIKU, ROUTED = "gpt-5-mini", "claude-haiku-4-5", "anthropic/claude-sonnet-4"
MAX_TOKENS: Final = 200
# Nano-dollars a token, as the providers publish them (2026): prompt, completion.
PRICES: Final = {MINI: (250, 2_000), HAIKU: (1_000, 5_000), ROUTED: (3_000, 15_000)}
POLICY: Final = (
    TWO_PROVIDERS
    + """
[tasks.both]
provider = "openai"
model = "gpt-5-mini"
fallback = {{ provider = "claude", model = "claude-haiku-4-5" }}
max_tokens = 200

[tasks.from_default]
model = "anthropic/claude-sonnet-4"
fallback = [{{ provider = "claude", model = "claude-haiku-4-5" }}]
max_tokens = 200

[tasks.dear]
provider = "openai"
model = "gpt-5-mini"
cheaper = {{ provider = "claude", model = "claude-haiku-4-5" }}
max_tokens = 200

[tasks.cheaper]
provider = "claude"
model = "claude-haiku-4-5"
cheaper = {{ provider = "openai", model = "gpt-5-mini" }}
max_tokens = 200
"""
)


def cost_of(model: str) -> int:
    """Return what an answer costs at a model, nano-dollars."""
    prompt, completion = PRICES[model]
    return PROMPT_TOKENS * prompt + COMPLETION_TOKENS * completion


def bound_of(model: str) -> int:
    prompt, completion = PRICES[model]
    # Anthropic's cache writes for an hour cost twice a prompt token, OpenAI's nothing more.
    return PROMPT_BOUND * prompt * (2 if model == HAIKU else 1) + MAX_TOKENS * completion


@dataclass(frozen=True, slots=True)
class Providers:
    """A system, and the two providers beside its default one."""

    calling: Calling
    openai: StandIn
    claude: StandIn

    async def run(self, task: str = "both", **fields: Any) -> InferenceResult:
        """Make a call with the system's own runner."""
        runtime = self.calling.runtime
        single = SingleTry(runtime.reservations, runtime.runner)
        result = await single.run(self.calling.call(task=task, **fields), is_final=True)
        assert isinstance(result, InferenceResult)
        return result

    async def attempts(self, call_id: str = "t1") -> list[ModelCalled]:
        """Return the attempts of a call, as the ledger has them."""
        events = await self.calling.events(call_id)
        return [event.payload for event in events if isinstance(event.payload, ModelCalled)]

    @property
    def booked(self) -> int:
        """What all three books have, nano-dollars."""
        books = [self.calling.provider.book, self.openai.book, self.claude.book]
        return sum(sum(book.totals().values()) for book in books)


def policy_file(tmp_path: Path, openai: StandIn, claude: StandIn, more: str = "") -> Path:
    file = tmp_path / "providers.toml"
    file.write_text(POLICY.format(**addresses_of(openai=openai, claude=claude)) + more)
    return file


@asynccontextmanager
async def opened(server_url: str, tmp_path: Path, more: str = "", **settings: Any) -> AsyncIterator[Providers]:
    async with (
        StandIn(StandInConfig(api_key=OPENAI_KEY)) as openai,
        StandIn(StandInConfig(api_key=CLAUDE_KEY)) as claude,
        open_calling(
            server_url, tmp_path, policy_file=policy_file(tmp_path, openai, claude, more), retries=0, **settings
        ) as calling,
    ):
        yield Providers(calling, openai, claude)
        await calling.check_guarantees(is_exact=False)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_OPENAI_KEY", OPENAI_KEY)
    monkeypatch.setenv("TEST_CLAUDE_KEY", CLAUDE_KEY)


@pytest.fixture
async def providers(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Providers]:
    assert await redis_client.ping()
    async with opened(server_url, tmp_path) as providers:
        yield providers


async def test_a_route_names_its_provider_and_is_priced_there(providers: Providers) -> None:
    result = await providers.run()
    assert (result.status, result.model_used) == (TaskStatus.DONE, MINI)
    assert nanousd_from_usd(result.cost_usd) == cost_of(MINI) == providers.booked
    (hold,) = [event for event in await providers.calling.events("t1") if isinstance(event.payload, BudgetReserved)]
    assert isinstance(hold.payload, BudgetReserved)
    assert (hold.amount, hold.payload.bound.provider, hold.payload.bound.model) == (bound_of(MINI), "openai", MINI)
    (attempt,) = await providers.attempts()
    assert (attempt.provider, attempt.model, attempt.charge_basis) == ("openai", MINI, "priced")
    assert (attempt.price_source or "").startswith("catalogue")


@pytest.mark.parametrize(
    ("fault", "spent"),
    first_quick(1, [
        ("http_503", 0), ("reset_after_charge", bound_of(MINI)), ("missing_usage", None),
        ("http_429:600", 0), ("http_401", 0), ("http_400", 0), ("http_402", 0), ("error_in_200", 0),
        ("hang_charged", bound_of(MINI)),
    ]),
)  # fmt: skip
async def test_a_fallback_crosses_to_another_provider(providers: Providers, fault: str, spent: int | None) -> None:
    providers.openai.faults = FaultPlan(script=[fault])
    result = await providers.run()
    if spent is None:  # An answer that states no usage is an answer (G4).
        assert (result.model_used, nanousd_from_usd(result.cost_usd)) == (MINI, bound_of(MINI))
        return
    assert (result.status, result.model_used) == (TaskStatus.DONE, HAIKU)
    assert nanousd_from_usd(result.cost_usd) == spent + cost_of(HAIKU)
    assert [(each.provider, each.model) for each in await providers.attempts()] == [("openai", MINI), ("claude", HAIKU)]
    (fell,) = [e.payload for e in await providers.calling.events("t1") if isinstance(e.payload, FallbackUsed)]
    assert (fell.from_provider, fell.from_model, fell.to_provider, fell.to_model) == ("openai", MINI, "claude", HAIKU)
    assert await providers.calling.spent() == spent + cost_of(HAIKU)


@pytest.mark.slow
async def test_a_provider_that_is_gone_is_left_for_another(providers: Providers) -> None:
    """No other model of the same provider would help, so within one provider there is no fallback."""
    await providers.openai.stop()
    result = await providers.run()
    assert (result.status, result.model_used) == (TaskStatus.DONE, HAIKU)
    assert nanousd_from_usd(result.cost_usd) == cost_of(HAIKU) == providers.booked
    assert [each.outcome for each in await providers.attempts()] == ["not_sent", "ok"]


async def test_the_default_provider_falls_back_to_a_named_one(providers: Providers) -> None:
    providers.calling.script("http_401")
    result = await providers.run("from_default")
    assert (result.status, result.model_used) == (TaskStatus.DONE, HAIKU)
    assert [(each.provider, each.model) for each in await providers.attempts()] == [(None, ROUTED), ("claude", HAIKU)]
    assert nanousd_from_usd(result.cost_usd) == cost_of(HAIKU) == providers.booked


@pytest.mark.slow
async def test_at_the_cap_the_next_providers_price_decides(providers: Providers) -> None:
    """G1. The hold covers the first model, and there is no money for the second, which is dearer."""
    await providers.calling.set_cap(bound_of(HAIKU) - 1)
    providers.openai.faults = FaultPlan(script=["http_503"])
    result = await providers.run()
    assert (result.status, result.error_code) == (TaskStatus.FAILED, ErrorCode.INFERENCE_FAILED)
    assert "claude-haiku-4-5 at claude is not tried" in (result.error or "")
    assert (providers.claude.requests, providers.booked) == (0, 0)


async def test_at_the_cap_exactly_the_fallback_fits(providers: Providers) -> None:
    """G1 G9."""
    await providers.calling.set_cap(bound_of(HAIKU))
    providers.openai.faults = FaultPlan(script=["http_503"])
    result = await providers.run()
    assert nanousd_from_usd(result.cost_usd) == cost_of(HAIKU) == providers.booked


async def test_the_cheaper_model_may_be_another_providers(providers: Providers) -> None:
    await providers.calling.set_cap(bound_of(MINI))
    result = await providers.run("cheaper")
    assert (result.status, result.model_used, result.downgraded_from) == (TaskStatus.DONE, MINI, HAIKU)
    assert nanousd_from_usd(result.cost_usd) == cost_of(MINI) == providers.booked


@pytest.mark.slow
async def test_both_fail_and_the_reason_of_the_last_is_reported(providers: Providers) -> None:
    providers.openai.faults = FaultPlan(script=["http_503"])
    providers.claude.faults = FaultPlan(script=["http_529"])
    result = await providers.run()
    assert (result.status, result.error_code) == (TaskStatus.FAILED, ErrorCode.INFERENCE_FAILED)
    assert [(each.provider, each.reason) for each in await providers.attempts()] == [
        ("openai", "overloaded"), ("claude", "overloaded"),
    ]  # fmt: skip
    assert providers.booked == 0


@pytest.mark.slow
async def test_a_task_that_one_provider_refuses_goes_to_the_other(providers: Providers) -> None:
    """Anthropic has no seed: it is no fallback for such a call, which it refuses before money is held."""
    providers.openai.faults = FaultPlan(script=["http_503"])
    failed = await providers.run(seed=7)
    assert (failed.status, providers.claude.requests) == (TaskStatus.FAILED, 0)
    refused = await providers.run("cheaper", call_id="t2", seed=7)
    assert refused.error_code is ErrorCode.INVALID_TASK
    assert "claude-haiku-4-5 does not support 'seed'" in (refused.error or "")
    assert await providers.calling.events("t2") == []
    dear = await providers.run("dear", call_id="t3", seed=7)
    assert dear.model_used == MINI, "a cheaper model that does not take the seed is none"


@pytest.mark.slow
async def test_a_model_that_a_task_names_is_one_of_the_routes_provider(providers: Providers) -> None:
    result = await providers.run(model="gpt-4o-mini")
    (attempt,) = await providers.attempts()
    assert (attempt.provider, attempt.model, result.model_used) == ("openai", "gpt-4o-mini", "gpt-4o-mini")
    assert nanousd_from_usd(result.cost_usd) == PROMPT_TOKENS * 150 + COMPLETION_TOKENS * 600 == providers.booked


@pytest.mark.slow
async def test_a_key_that_goes_missing_later_costs_nothing_and_the_fallback_answers(
    redis_client: Redis, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await redis_client.ping()
    monkeypatch.delenv("TEST_OPENAI_KEY")
    async with opened(server_url, tmp_path) as providers:
        result = await providers.run()
        (first, second) = await providers.attempts()
    assert (first.outcome, first.reason, first.charge_nanousd) == ("not_sent", "bad_key", 0)
    assert (second.provider, result.model_used) == ("claude", HAIKU)
    assert providers.openai.requests == 0


async def test_a_providers_own_price_counts_before_all_others(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    assert await redis_client.ping()
    more = (
        '[prices."gpt-5-mini"]\nprompt = 7\ncompletion = 9\n[prices."claude-haiku-4-5"]\nprompt = 4\ncompletion = 8\n'
        '[providers.claude.prices."claude-haiku-4-5"]\nprompt = 2\ncompletion = 6\n'
    )
    async with opened(server_url, tmp_path, more) as providers:
        at_openai = await providers.run()
        at_claude = await providers.run("cheaper", call_id="t2")
    assert nanousd_from_usd(at_openai.cost_usd) == PROMPT_TOKENS * 7_000 + COMPLETION_TOKENS * 9_000
    assert nanousd_from_usd(at_claude.cost_usd) == PROMPT_TOKENS * 2_000 + COMPLETION_TOKENS * 6_000


@pytest.mark.slow
async def test_each_provider_is_asked_for_its_own_models(providers: Providers) -> None:
    runtime = providers.calling.runtime
    assert runtime.prices.at("openai").models is not runtime.prices.at("claude").models
    async with ProviderClients.from_settings(runtime.settings) as clients:
        await providers.claude.stop()  # One that does not answer keeps no other from being asked.
        await learn_all(runtime.policies, clients, runtime.settings, now_ms=now_ms)
        assert set(await clients.at("openai", runtime.rules).models()) == {"gpt-4o-mini", "gpt-5-mini"}


async def test_a_provider_of_a_new_policy_is_asked_for_its_prices_at_once(providers: Providers) -> None:
    runtime = providers.calling.runtime
    async with StandIn(StandInConfig(api_key=OPENAI_KEY, lists_prices=True)) as second:
        rule = {"base_url": f"{second.root_url}/api/v1", "key_env": "TEST_OPENAI_KEY", "dialect": "openrouter"}
        content = runtime.rules.content()
        content["providers"]["second"] = rule
        content["tasks"]["second"] = {"provider": "second", "model": ROUTED, "max_tokens": MAX_TOKENS}
        gates = build_gates(runtime.handle, runtime.settings)
        await apply_policy(gates, Policy.model_validate(content), Signature("ops", "a second router"))
        assert await runtime.policies.refresh()
        lists = runtime.prices.at("second").models.price_lists
        await wait_until(lambda: lists.in_force(now_ms()) is not None, what="the second provider's prices")
        result = await providers.run("second")
        (attempt,) = await providers.attempts()
        assert (attempt.provider, nanousd_from_usd(result.cost_usd)) == ("second", cost_of(ROUTED))
        (hold,) = [e.payload for e in await providers.calling.events("t1") if isinstance(e.payload, BudgetReserved)]
        assert (hold.bound.source or "").startswith("provider 20")


@pytest.mark.slow
async def test_reconcile_asks_the_provider_that_was_called(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """OpenAI does not tell what a request cost, a second OpenRouter does, and the default one is not asked for it."""
    assert await redis_client.ping()
    more = """
[providers.second]
base_url = "{url}/api/v1"
key_env = "TEST_OPENAI_KEY"
dialect = "openrouter"

[tasks.second]
provider = "second"
model = "anthropic/claude-sonnet-4"
max_tokens = 200
"""
    async with (
        StandIn(StandInConfig(api_key=OPENAI_KEY)) as second,
        opened(server_url, tmp_path, more.format(url=second.root_url)) as providers,
    ):
        second.faults = FaultPlan(script=["missing_usage"])
        providers.openai.faults = FaultPlan(script=["missing_usage"])
        assumed = await providers.run("second")
        kept = await providers.run(call_id="t2")
        assert nanousd_from_usd(kept.cost_usd) == bound_of(MINI)
        await providers.calling.folded()
        runtime = providers.calling.runtime
        async with ProviderClients.from_settings(runtime.settings) as clients:
            costs = CostLookup(clients, runtime.rules)
            outcome = await reconcile(providers.calling.query, runtime.ledger, costs, author="test")
        assert (outcome.asked, outcome.adjusted, outcome.unknown) == (2, 1, ["t2"])
        assert outcome.difference_nanousd == cost_of(ROUTED) - nanousd_from_usd(assumed.cost_usd)
        assert await providers.calling.spent() == cost_of(ROUTED) + bound_of(MINI)


THOUGHTS: Final = {
    "reasoning": "hm", "reasoning_content": "hm",
    "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": ""}],
    "reasoning_details": [{"type": "reasoning.encrypted", "data": "eA==", "format": "openai-responses-v1"}],
}  # fmt: skip
LOOP: Final[list[dict[str, Any]]] = [
    {"role": "user", "content": PROMPT},
    {
        "role": "assistant",
        **THOUGHTS,
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}, "extra_content": {"google": {}}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "7"},
    {"role": "assistant", "reasoning_details": THOUGHTS["reasoning_details"]},
]


@pytest.mark.parametrize("task", ["both", "from_default"])
async def test_a_loop_with_the_reasoning_of_one_provider_goes_on_at_another(providers: Providers, task: str) -> None:
    """OpenAI knows no such fields, and Anthropic no unsigned thoughts: both stand-ins refuse what they would."""
    first = providers.openai if task == "both" else providers.calling.provider
    for number, fault in enumerate((None, "http_503")):
        first.faults = FaultPlan(script=[fault])
        fields: dict[str, Any] = {"prompt": None, "messages": LOOP, "max_tokens": 2_000, "reasoning_effort": "low"}
        result = await providers.run(task, call_id=f"t{number}", **fields)
        assert (result.status, result.error) == (TaskStatus.DONE, None)
        assert (result.model_used == HAIKU) == (fault is not None)
    assert await providers.calling.spent() == providers.booked


async def test_no_key_of_a_provider_is_in_an_event(providers: Providers) -> None:
    """G10."""
    providers.openai.faults = FaultPlan(script=["http_401"])
    await providers.run()
    events = repr(await providers.calling.raw_events())
    for secret in (OPENAI_KEY, CLAUDE_KEY, PROMPT):
        assert secret not in events
    assert "TEST_OPENAI_KEY" in events, "the policy names the variable"
    assert json.dumps(PROMPT)[1:-1] not in events
