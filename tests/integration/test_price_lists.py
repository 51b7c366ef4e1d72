"""Lists of prices from the provider: kept on disk, dated, never overwritten; and how calls use them."""

import json
import os
import stat
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.calling import Calling, open_calling
from tollbook.app.doctor import examine
from tollbook.inference.calls.call import Call
from tollbook.inference.calls.holds import Hold
from tollbook.inference.errors import ProviderUnavailable
from tollbook.inference.learning_models import learn_models
from tollbook.inference.prices.price_lists import FOLDER, PriceLists
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.runtime import now_ms, open_ledger, open_runtime
from tollbook.inference.settings import Settings
from tollbook.schemas.events import BudgetReserved, ModelCalled
from tollbook.schemas.results import InferenceResult
from tollbook.standin.prices import PRICES, ListPrice

URL = "https://openrouter.ai/api/v1"
NOON_MS = round(datetime(2026, 11, 29, 12, tzinfo=UTC).timestamp() * 1000)
HOUR_MS = 3_600_000
FIRST = {"acme/a": {"prompt": "0.000001", "completion": "0.000002"}}
SECOND = {"acme/a": {"prompt": "0.000003", "completion": "0.000004"}}
HAIKU = "anthropic/claude-3-haiku"
DEARER = ListPrice(prompt=500_000_000, completion=2_500_000_000, cached=60_000_000, written=600_000_000)


def prompt_price(lists: PriceLists, at_ms: int) -> int | None:
    found = lists.in_force(at_ms)
    price = None if found is None else found.price("acme/a")
    return None if price is None else price.tiers[0].prompt_nanousd_per_mtok


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*")}


def test_each_list_is_in_force_from_when_it_was_fetched_and_a_restart_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "prices"
    lists = PriceLists(folder, URL)
    assert lists.in_force(NOON_MS) is None
    assert lists.add(FIRST, NOON_MS)
    kept = files(folder)
    assert list(kept) == ["openrouter.ai-api-v1-2026-11-29T12-00-00.000Z.json"]
    assert stat.S_IMODE((folder / next(iter(kept))).stat().st_mode) == 0o600
    assert not lists.add(dict(FIRST), NOON_MS + HOUR_MS), "an equal list adds no file"
    assert files(folder) == kept
    assert lists.add(SECOND, NOON_MS + 2 * HOUR_MS)
    assert lists.add(FIRST, NOON_MS + 3 * HOUR_MS + 7), "prices that come back are a list of their own"
    assert len(files(folder)) == 3
    assert files(folder).items() >= kept.items(), "what is there is never changed"
    for each in (lists, PriceLists(folder, URL)):
        found = [prompt_price(each, NOON_MS + hours * HOUR_MS) for hours in (-1, 0, 1, 2, 3, 4)]
        assert found == [None, 10**9, 10**9, 3 * 10**9, 3 * 10**9, 10**9]
    in_force = PriceLists(folder, URL).in_force(NOON_MS + 4 * HOUR_MS)
    assert in_force is not None
    assert in_force.source == "provider 2026-11-29T15:00:00.007Z"


def test_a_list_without_prices_leaves_the_one_in_force(tmp_path: Path) -> None:
    lists = PriceLists(tmp_path, URL)
    assert not lists.add({}, NOON_MS)
    lists.add(FIRST, NOON_MS)
    assert not lists.add({}, NOON_MS + HOUR_MS)
    assert prompt_price(lists, NOON_MS + HOUR_MS) == 10**9


def test_processes_that_share_a_directory_keep_a_list_once(tmp_path: Path) -> None:
    first, second = PriceLists(tmp_path, URL), PriceLists(tmp_path, URL)
    assert first.add(FIRST, NOON_MS)
    assert not second.add(FIRST, NOON_MS + 1)
    assert not second.add(SECOND, NOON_MS), "a file of that moment exists, and stays"
    assert [prompt_price(each, NOON_MS + 1) for each in (first, second)] == [10**9, 10**9]
    first.add(SECOND, NOON_MS + 2)
    second.refresh()
    assert prompt_price(second, NOON_MS + 2) == 3 * 10**9


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8001/v1", "https://openrouter.ai/api-v1", "https://other.test/api/v1"]
)
def test_lists_of_another_address_do_not_count(tmp_path: Path, url: str) -> None:
    PriceLists(tmp_path, URL).add(FIRST, NOON_MS)
    assert PriceLists(tmp_path, url).in_force(NOON_MS) is None


def test_the_password_of_an_address_is_not_shown(tmp_path: Path) -> None:
    PriceLists(tmp_path, "https://me:secret@llm.test:8443/v1/").add(FIRST, NOON_MS)
    ((name, text),) = files(tmp_path).items()
    assert name.startswith("llm.test-8443-v1-2026")
    assert json.loads(text)["provider"] == "llm.test:8443/v1"
    assert "secret" not in text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"provider": "openrouter.ai/api/v1", "pricing": 7}', "[" * 100_000])
def test_a_price_file_that_cannot_be_read_is_skipped(tmp_path: Path, text: str) -> None:
    lists = PriceLists(tmp_path, URL)
    lists.add(FIRST, NOON_MS)
    lists.add(SECOND, NOON_MS + HOUR_MS)
    (tmp_path / "openrouter.ai-api-v1-2026-11-29T13-00-00.000Z.json").write_text(text)
    (tmp_path / "openrouter.ai-api-v1-yesterdayZ.json").write_text(text)
    assert prompt_price(PriceLists(tmp_path, URL), NOON_MS + HOUR_MS) == 10**9


def test_prices_that_somebody_wrote_into_a_file_are_not_trusted(tmp_path: Path) -> None:
    PriceLists(tmp_path, URL).add(FIRST | {"acme/b": FIRST["acme/a"]}, NOON_MS)
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    document["pricing"]["acme/a"]["prompt"] = -1
    path.write_text(json.dumps(document))
    lists = PriceLists(tmp_path, URL)
    assert prompt_price(lists, NOON_MS) is None
    found = lists.in_force(NOON_MS)
    assert found is not None
    assert found.price("acme/b") is not None


def test_a_directory_that_cannot_be_written_affects_only_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "prices").write_text("in the way")
    lists = PriceLists(tmp_path / "prices", URL)
    assert lists.add(FIRST, NOON_MS)
    assert prompt_price(lists, NOON_MS) == 10**9
    assert not lists.add(FIRST, NOON_MS + HOUR_MS)
    assert PriceLists(tmp_path / "prices", URL).in_force(NOON_MS) is None


def test_many_lists_are_found_without_being_kept_in_memory(tmp_path: Path) -> None:
    lists = PriceLists(tmp_path, URL)
    for number in range(40):
        lists.add(SECOND if number % 2 else FIRST, NOON_MS + number)
    opened = PriceLists(tmp_path, URL)
    assert [prompt_price(opened, NOON_MS + number) for number in range(40)] == [10**9, 3 * 10**9] * 20
    assert len(opened._loaded) <= 16


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        calling.provider.list_prices = dict(PRICES)
        await learn(calling)
        yield calling
        await calling.check_guarantees(is_exact=False)  # The stand-in charges its old prices.


async def learn(calling: Calling) -> None:
    async with ProviderClient.from_settings(calling.runtime.settings) as provider:
        await learn_models(calling.runtime.policies.models, provider, now_ms=now_ms)


def call_of(calling: Calling, model: str) -> Call:
    """Make a call of one model alone."""
    call = calling.call(model=model)
    fields = {name: getattr(call, name) for name in Call.__dataclass_fields__}
    return Call(**{**fields, "route": call.route.model_copy(update={"fallback": ()})})


async def payloads(calling: Calling, call_id: str) -> tuple[list[BudgetReserved], list[ModelCalled]]:
    events = [event.payload for event in await calling.events(call_id)]
    holds = [each for each in events if isinstance(each, BudgetReserved)]
    return holds, [each for each in events if isinstance(each, ModelCalled)]


def source_of(calling: Calling) -> str:
    in_force = calling.runtime.policies.models.price_lists.in_force(now_ms())
    assert in_force is not None
    return in_force.source


async def test_a_price_that_changes_while_running_counts_from_the_next_call(calling: Calling) -> None:
    folder = calling.runtime.settings.data_dir / FOLDER
    before, sources = files(folder), [source_of(calling)]
    assert len(before) == 1
    async with calling.runner() as (runner, _):
        calling.script("missing_cost", "missing_cost")
        await runner.run(calling.call("first", model=HAIKU))
        calling.provider.list_prices[HAIKU] = DEARER
        await learn(calling)
        sources.append(source_of(calling))
        await runner.run(calling.call("second", model=HAIKU))
    assert files(folder).items() > before.items()
    assert sources[0] < sources[1]
    charges: list[int] = []
    for call_id, source, price in (("first", sources[0], PRICES[HAIKU]), ("second", sources[1], DEARER)):
        (hold,), (called,) = await payloads(calling, call_id)
        assert (hold.bound.source, called.price_source) == (source, source)
        # Every token may be written to the cache, which is what costs most.
        assert hold.bound.prompt_nanousd_per_mtok == price.written
        assert hold.bound.completion_nanousd_per_mtok == price.completion
        charges.append(called.charge_nanousd)
    assert charges[1] == 2 * charges[0] > 0


async def test_a_reported_cost_has_no_source_of_a_price(calling: Calling) -> None:
    async with calling.runner() as (runner, _):
        await runner.run(calling.call(model=HAIKU))
    (hold,), (called,) = await payloads(calling, "t1")
    assert (hold.bound.source, called.charge_basis, called.price_source) == (source_of(calling), "reported", None)


async def test_a_second_attempt_is_held_for_at_the_price_that_rose(calling: Calling) -> None:
    lists = calling.runtime.policies.models.price_lists
    answers = [httpx.Response(503), httpx.Response(500)]

    def answer(_: httpx.Request) -> httpx.Response:
        lists.add({HAIKU: {"prompt": "0.0000005", "completion": "0.0000025"}}, now_ms())
        return answers.pop(0)

    async with calling.runner(transport=httpx.MockTransport(answer)) as (runner, _):
        await runner.run(call_of(calling, HAIKU))
    (hold, extension), _ = await payloads(calling, "t1")
    assert extension.kind == "extension"
    assert extension.bound.completion_nanousd_per_mtok == 2 * hold.bound.completion_nanousd_per_mtok


async def test_a_hold_below_a_raised_price_sends_no_request(calling: Calling) -> None:
    """The reply to the first request for money was lost, and the price rose before the second."""
    call = calling.call(model=HAIKU)
    async with calling.runner() as (runner, _):
        assert isinstance(await runner.reserve(call), Hold)
        calling.provider.list_prices[HAIKU] = DEARER
        await learn(calling)
        result = await runner.run(call)
    assert isinstance(result, InferenceResult)
    assert result.error == f"the price of {HAIKU} rose after the money was held; send the task again"
    assert calling.provider.requests == 0
    assert await calling.spent() == 0


async def test_a_model_that_only_the_provider_prices_is_called_and_ends_with_its_price(calling: Calling) -> None:
    lists = calling.runtime.policies.models.price_lists
    lists.add({"acme/new": FIRST["acme/a"]}, now_ms())
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["model"])
        return httpx.Response(500)

    async with calling.runner(transport=httpx.MockTransport(answer)) as (runner, _):
        await runner.run(call_of(calling, "acme/new"))
    assert set(asked) == {"acme/new"}


async def test_a_restart_without_network_has_the_prices(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        settings = calling.runtime.settings
        calling.provider.list_prices = {HAIKU: DEARER}
        await learn(calling)
        source = source_of(calling)
    async with ProviderClient.from_settings(settings) as provider:
        with pytest.raises(ProviderUnavailable):
            await provider.models()
    async with open_ledger(settings, server_url) as handle, open_runtime(settings, handle, no_baselines) as runtime:
        price = runtime.prices.price(HAIKU, now_ms())
    assert (price.source, price.tiers[0].completion_nanousd_per_mtok) == (source, DEARER.completion)
    found = await route_findings(settings)
    assert f"{HAIKU} ({source})" in found["price score_post"]
    assert "(catalogue " in found["price generate_draft"]


async def no_baselines(names: Sequence[str]) -> Any:
    raise AssertionError(names)


async def route_findings(settings: Settings) -> dict[str, str]:
    findings = await examine(settings)
    return {each.check: each.found for each in findings if each.check.startswith("price ")}


async def test_what_the_provider_lists_is_read_over_http(calling: Calling) -> None:
    async with ProviderClient.from_settings(calling.runtime.settings) as provider:
        facts = (await provider.models())[HAIKU]
        assert facts.pricing == {
            "prompt": "0.00000025",
            "completion": "0.00000125",
            "input_cache_read": "0.00000003",
            "input_cache_write": "0.0000003",
        }
        calling.provider.list_prices.clear()
        assert (await provider.models())[HAIKU].pricing is None


def test_the_folder_of_the_lists_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        PriceLists(tmp_path / "prices", URL).add(FIRST, NOON_MS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "prices").stat().st_mode) == 0o700
    modes: list[Any] = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "prices").iterdir()]
    assert modes == [0o600]
