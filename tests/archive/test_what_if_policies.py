"""What if another policy had been in force: its budgets, prices and routes, on ledgers of the running system."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.archive.gate_ledger import GateLedger, gate_ledger
from tests.archive.what_if_ledgers import MODEL, OTHER, Script, decide, table_of
from tests.calling import COMPLETION_TOKENS, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tests.integration.test_policies import put_in_force, run
from tests.quick import first_quick
from tollbook.audit.what_if import Alternatives, OtherRoute, Outcome, WhatIf
from tollbook.audit.what_if.assumptions import assumptions
from tollbook.cli.what_if import read_alternatives
from tollbook.inference.prepaid import Credit, Prepaid
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.ledger.signature import Signature
from tollbook.schemas.money import NANOUSD_PER_USD, usd_from_nanousd
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.results import InferenceResult, TaskStatus

SONNET: Final = "anthropic/claude-sonnet-4"
MINI: Final = "openai/gpt-4o-mini"
FLASH: Final = "google/gemini-2.5-flash"
ROUTE: Final = {"model": SONNET, "max_tokens": 100}
# A call's cost and bound with the first model: 3 and 15 dollars per million tokens, 3.75 for a prompt that is cached.
COST: Final = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
BOUND: Final = PROMPT_BOUND * 3_750 + 100 * 15_000
TEAM: Final = {"name": "team", "by": ["team"], "window": "week"}


@pytest.fixture(autouse=True)
def _is_empty(redis_client: Redis) -> None:
    """Begin with an empty server."""


def policy_of(route: dict[str, Any] | None = None, **changes: Any) -> Policy:
    return default_policy({"tasks": {"generate_draft": route or ROUTE}, **changes})


def usd(nanousd: int) -> str:
    return str(usd_from_nanousd(nanousd))


async def what_if(calling: Calling, other: Policy | None) -> Outcome:
    in_force = calling.runtime.policies.newest.policy
    entries = [[entry_id, [part for pair in fields.items() for part in pair]] for entry_id, fields in
               await calling.raw_events()]  # fmt: skip
    changed = Alternatives() if other is None else Alternatives.of_policy(other, in_force)
    if other is None:
        return decide(entries)
    walk = WhatIf(changed, PriceCatalogue.of_policy(other, provider="openrouter").price_anywhere)
    walk.fold(table_of(entries))
    return walk.finish()


async def call(calling: Calling, *ids: str, **fields: Any) -> list[InferenceResult]:
    return [await run(calling, each, **fields) for each in ids]


async def test_a_budget_by_a_tag_and_a_week(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, policy_of())
        await call(calling, "r1", "r2", tags={"team": "red"})
        await call(calling, "b1", tags={"team": "blue"})
        await call(calling, "n1", "n2")
        other = policy_of(budgets=[TEAM | {"cap_usd": usd(COST + BOUND - 1)}])
        outcome = await what_if(calling, other)
        assert [(each.call_id, each.budget.split(":")[:2]) for each in outcome.first_refusals()] == [
            ("r2", ["team", "red"])
        ]
        assert outcome.total().difference_nanousd == -COST
        assert (await what_if(calling, policy_of(budgets=[TEAM | {"cap_usd": usd(COST + BOUND)}]))).refusals == []
        # No other user's calls are reported, and without changes the numbers are the recorded ones.
        same = await what_if(calling, policy_of())
        assert (same.total().is_changed, same.unexplained) == (False, 0)


async def test_a_budget_that_is_gone_or_has_another_cap(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, policy_of(budgets=[TEAM | {"cap_usd": 1}]))
        # Defined anew: `team~2` in keys.
        await put_in_force(calling, policy_of(budgets=[TEAM | {"by": ["team", "user"], "cap_usd": usd(BOUND)}]))
        results = await call(calling, "r1", "r2", "r3", tags={"team": "r,%:d"})
        assert [each.status for each in results] == [TaskStatus.DONE, TaskStatus.DENIED, TaskStatus.DENIED]
        assert (await what_if(calling, policy_of())).total().allowed == 2
        wider = policy_of(budgets=[TEAM | {"by": ["team", "user"], "cap_usd": usd(COST + BOUND)}])
        assert (await what_if(calling, wider)).total().allowed == 1
        single = TEAM | {"by": ["team", "user"], "cap_usd": 0, "caps": {"r%2C%25:d,u1": usd(COST + BOUND)}}
        assert (await what_if(calling, policy_of(budgets=[single]))).total().allowed == 1
        none = policy_of(budgets=[TEAM | {"by": ["team", "user"], "cap_usd": 0}])
        assert (await what_if(calling, none)).total().newly_refused == 1


async def test_a_prepaid_budget_has_its_credits(server_url: str, tmp_path: Path) -> None:
    client = {"name": "client", "by": ["client"], "window": "total", "cap_usd": 0}
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, policy_of(budgets=[client]))
        runtime = calling.runtime
        await runtime.policies.refresh()
        prepaid = Prepaid(runtime.ledger, runtime.policies, runtime.user_ids)
        await prepaid.grant(Credit("client", "acme", "pay_1"), BOUND, Signature("shop", "paid"))
        results = await call(calling, "a1", "a2", tags={"client": "acme"})
        assert [each.status for each in results] == [TaskStatus.DONE, TaskStatus.DENIED]
        same = await what_if(calling, policy_of(budgets=[client]))
        assert (same.total().is_changed, same.unexplained) == (False, 0)
        assert (await what_if(calling, policy_of(budgets=[client | {"cap_usd": usd(COST)}]))).total().allowed == 1
        # Another definition begins at the beginning, and has the credit of its name and value.
        daily = policy_of(budgets=[client, {"name": "day", "by": ["user"], "window": "day", "cap_usd": usd(BOUND - 1)}])
        assert [each.budget.split(":")[0] for each in (await what_if(calling, daily)).first_refusals()] == ["day"]


async def test_the_cheaper_model_is_taken_where_the_first_does_not_fit(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, policy_of())
        await call(calling, "c1", "c2")
        cap = {"plans": {"trial": {"cap_usd": usd(BOUND)}}}
        assert (await what_if(calling, policy_of(**cap))).total().newly_refused == 1
        outcome = await what_if(calling, policy_of(ROUTE | {"cheaper": MINI}, **cap))
        cheaper = PROMPT_TOKENS * 150 + COMPLETION_TOKENS * 600
        assert outcome.total().newly_refused == 0
        assert outcome.total().other_spent_nanousd == COST + cheaper


async def test_a_call_that_was_downgraded_would_have_had_its_first_model(server_url: str, tmp_path: Path) -> None:
    route = ROUTE | {"cheaper": MINI}
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, policy_of(route, plans={"trial": {"cap_usd": usd(BOUND)}}))
        results = await call(calling, "c1", "c2")
        assert [each.model_used for each in results] == [SONNET, MINI]
        same = await what_if(calling, policy_of(route, plans={"trial": {"cap_usd": usd(BOUND)}}))
        assert (same.total().is_changed, same.unexplained) == (False, 0)
        outcome = await what_if(calling, policy_of(route))
        assert outcome.total().other_spent_nanousd == 2 * COST


async def test_every_fallback_of_a_route_has_its_place(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path, retries=0) as calling:
        await put_in_force(calling, policy_of(ROUTE | {"fallback": [FLASH, MINI]}))
        calling.script("http_500", "http_500")
        (result,) = await call(calling, "c1")
        assert result.model_used == MINI
        third = await what_if(calling, policy_of(ROUTE | {"fallback": [FLASH, "anthropic/claude-3-haiku"]}))
        # A quarter of a dollar and a dollar and a quarter per million tokens.
        assert third.total().other_spent_nanousd == PROMPT_TOKENS * 250 + COMPLETION_TOKENS * 1_250
        second = await what_if(calling, policy_of(ROUTE | {"fallback": "anthropic/claude-3-haiku"}))
        assert (second.total().cut_short, second.total().other_spent_nanousd) == (1, 0)


async def test_prices_count_from_their_day(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, policy_of())
        await call(calling, "c1")
        old, new = {"prompt": 1, "completion": 1}, {"prompt": 9, "completion": 9}
        later = policy_of(prices={SONNET: [old, new | {"from": "2999-01-01"}]})
        assert (await what_if(calling, later)).total().other_spent_nanousd == (
            PROMPT_TOKENS + COMPLETION_TOKENS
        ) * 1_000
        earlier = policy_of(prices={SONNET: [old, new | {"from": "2020-01-01"}]})
        spent = (await what_if(calling, earlier)).total().other_spent_nanousd
        assert spent == (PROMPT_TOKENS + COMPLETION_TOKENS) * 9_000


def test_assumptions_that_matter_are_printed() -> None:
    other = policy_of(ROUTE | {"cheaper": MINI}, budgets=[TEAM | {"cap_usd": 1}])
    said = " ".join(assumptions(Alternatives.of_policy(other, default_policy()), Outcome().total()))
    for words in ("does not have are decided as recorded", "cheaper one of its route", "an expiry takes back"):
        assert words in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", first_quick(1, [1, 2, 3]))
async def test_without_changes_it_equals_the_reports(redis_client: Redis, tmp_path: Path, seed: int) -> None:
    """Users, periods and plans, with plans that changed, taken-over calls, openings, credits and recorded spend."""
    made: GateLedger = await gate_ledger(redis_client, tmp_path, seed, 400)
    try:
        for changed in (Alternatives(), Alternatives(plan_caps_nanousd={"nobody's": 1})):
            walk = WhatIf(changed, PriceCatalogue().price_anywhere)
            async for events in made.source.events(0):
                walk.fold(events)
            outcome = walk.finish()
            assert outcome.unexplained == 0
            spent: dict[tuple[str, str], int] = {}
            for account, totals in outcome.accounts.items():
                assert totals.spent_nanousd == totals.other_spent_nanousd
                key = (account.user_id, account.period)
                spent[key] = spent.get(key, 0) + totals.spent_nanousd
            rows = made.store.query("SELECT user_id, period, spent_usd FROM spend WHERE spent_usd > 0")
            assert {key: value for key, value in spent.items() if value} == {
                (row["user_id"], row["period"]): int(row["spent_usd"] * NANOUSD_PER_USD) for row in rows
            }
            plans = made.store.query(
                "SELECT coalesce(plan, '-') AS plan, spent_usd FROM spend_by_plan WHERE spent_usd > 0"
            )
            assert {
                plan: sums.spent_nanousd for plan, (_, sums) in outcome.by_plan().items() if sums.spent_nanousd
            } == {row["plan"]: int(row["spent_usd"] * NANOUSD_PER_USD) for row in plans}
    finally:
        await made.aclose()


PROMPT, COMPLETION = 300, 70


def at_providers() -> Script:
    """One call of the same model at the default provider, and one at `own`."""
    usage = {"prompt_tokens": PROMPT, "completion_tokens": COMPLETION}
    script = Script().hold("c0", 50_000).called("c0", 20, usage=usage).settle("c0", 20)
    script.hold("c1", 50_000, provider="own").called("c1", 30, usage=usage, provider="own")
    return script.settle("c1", 30)


def priced(own: tuple[int, int], default: tuple[int, int] = (1, 1), **route: Any) -> Policy:
    """A policy with the model's price at each of two providers, in dollars per million tokens."""
    prices = [{"prompt": prompt, "completion": completion} for prompt, completion in (default, own)]
    provider = {"base_url": "https://own.example/v1", "dialect": "compatible", "prices": {MODEL: prices[1]}}
    return default_policy(
        {
            "prices": {MODEL: prices[0]},
            "providers": {"own": provider},
            "tasks": {"score_post": {"model": MODEL, "max_tokens": 100, "fallback": [], **route}},
        }
    )


@pytest.mark.parametrize(
    ("other", "costs"),
    [
        (priced(own=(3, 4)), 20 + PROMPT * 3_000 + COMPLETION * 4_000),
        (priced(own=(2, 2), default=(5, 6)), PROMPT * 5_000 + COMPLETION * 6_000 + 30),
        (priced(own=(2, 2), provider="own"), PROMPT * 2_000 + COMPLETION * 2_000 + 30),
    ],
    ids=["the provider's own price", "the price at the default one", "another provider of the route"],
)
def test_an_attempt_is_priced_at_its_provider(other: Policy, costs: int) -> None:
    in_force = priced(own=(2, 2))
    catalogue = PriceCatalogue.of_policy(other, provider="openrouter")
    walk = WhatIf(Alternatives.of_policy(other, in_force), catalogue.price_anywhere)
    walk.fold(table_of(at_providers().entries))
    assert walk.finish().total().other_spent_nanousd == costs


def fallen_back() -> Script:
    """A call that the default provider failed, and whose fallback is the same model at `own`."""
    usage = {"prompt_tokens": PROMPT, "completion_tokens": COMPLETION}
    script = Script().hold("c0", 500_000_000).called("c0", 20, usage=usage)
    return script.called("c0", 30, usage=usage, provider="own", attempt=2).settle("c0", 50)


def at_own(prompt: int, completion: int) -> Policy:
    return priced(own=(prompt, completion), fallback=[{"provider": "own", "model": MODEL}])


@pytest.mark.parametrize(
    ("changed", "costs"),
    [
        (Alternatives(), 20 + 30),
        (Alternatives.of_policy(at_own(3, 4), at_own(2, 2)), 20 + PROMPT * 3_000 + COMPLETION * 4_000),
        (Alternatives.of_policy(priced(own=(2, 2)), at_own(2, 2)), 20),
        (read_alternatives(fallbacks=["score_post=none"]), 20),
    ],
    ids=["nothing", "the other provider's price", "a policy without the fallback", "no fallback"],
)
def test_a_fallback_to_the_same_model_at_another_provider_is_one(changed: Alternatives, costs: int) -> None:
    catalogue = PriceCatalogue.of_policy(changed.policy or at_own(2, 2), provider="openrouter")
    walk = WhatIf(changed, catalogue.price_anywhere)
    walk.fold(table_of(fallen_back().entries))
    assert walk.finish().total().other_spent_nanousd == costs


def test_options_leave_what_they_do_not_name_as_the_other_policy_has_it() -> None:
    of_policy = OtherRoute(
        "m/a", ("m/b", "m/c"), "m/d", states_cheaper=True, providers=("own", "default", "own"), cheaper_provider="own"
    )
    base = Alternatives(routes={"score_post": of_policy})

    def route(*routes: str, fallbacks: Sequence[str] = ()) -> OtherRoute:
        return base.with_changes(read_alternatives(routes=routes, fallbacks=fallbacks)).routes["score_post"]

    assert route(fallbacks=["score_post=none"]) == replace(of_policy, fallbacks=(), providers=("own",))
    assert route(fallbacks=["score_post=m/e"]) == replace(of_policy, fallbacks=("m/e",), providers=("own",))
    assert route("score_post=m/e") == replace(of_policy, model="m/e", providers=(None, "default", "own"))
    assert route("score_post=m/e,m/f") == replace(of_policy, model="m/e", fallbacks=("m/f",), providers=(None,))


def test_another_model_of_a_route_has_its_price_where_the_attempt_was_made() -> None:
    """Two providers have it, at different prices."""
    prices = {OTHER: {"prompt": 7, "completion": 8}}
    policy = priced(own=(2, 2))
    providers = {
        "own": policy.providers["own"].model_copy(update={"prices": default_policy({"prices": prices}).prices})
    }
    dear = default_policy({"prices": {OTHER: {"prompt": 1, "completion": 1}}}).prices
    policy = policy.model_copy(update={"providers": providers, "prices": dear})
    walk = WhatIf(
        read_alternatives(routes=[f"score_post={OTHER}"]),
        PriceCatalogue.of_policy(policy, provider="openrouter").price_anywhere,
    )
    walk.fold(table_of(at_providers().entries))
    costs = PROMPT * 1_000 + COMPLETION * 1_000 + PROMPT * 7_000 + COMPLETION * 8_000
    assert walk.finish().total().other_spent_nanousd == costs


def test_a_short_name_is_also_another_providers_model_of_that_id() -> None:
    usage = {"prompt_tokens": PROMPT, "completion_tokens": COMPLETION}
    script, both = Script(), list[dict[str, Any]]()
    both += [{"model": "openai/gpt-4o-mini"}, {"model": "gpt-4o-mini", "provider": "own"}]
    for number, asked in enumerate(both):
        script.hold(f"c{number}", 50_000_000, **asked).called(f"c{number}", 20, usage=usage, **asked)
        script.settle(f"c{number}", 20)
    own = priced(own=(2, 2), provider="own", model="gpt-4o-mini")
    walk = WhatIf(read_alternatives(prices=["gpt-4o-mini=3,4"], policy=own), PriceCatalogue().price_anywhere)
    walk.fold(table_of(script.entries))
    assert walk.finish().total().other_spent_nanousd == 2 * (PROMPT * 3_000 + COMPLETION * 4_000)

    assert read_alternatives(routes=["score_post=gpt-4o-mini"], policy=own).routes["score_post"].model == "gpt-4o-mini"
