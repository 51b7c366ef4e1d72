"""Tokens of images, sound and videos in a usage: read in every provider's words, and priced by their kind."""

from dataclasses import replace
from decimal import Decimal
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_media import AUDIO, DEAR, FLAT, IMAGE, VIDEO, message
from tollbook.gateway.chat import usage_document
from tollbook.inference.attempts import Attempt
from tollbook.inference.bounds import Bound, bound
from tollbook.inference.calls.holds import Charge, charge_of, with_costliest_usage
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice, dated_prices, tier_from_usd
from tollbook.inference.providers.usage_report import UsageReport, joined_reports, read_usage
from tollbook.schemas.events import ModelCalled, payload_json
from tollbook.schemas.policy import ModelRule, PriceRule
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.usage import MediaUsage, Usage

LIMITS: Final = ModelRule(image_tokens=700, audio_tokens=900, video_tokens=30_000)
# Nano-dollars a token: of text, sound, videos, images; of the completion.
TEXT, SOUND, FILM, PICTURE, ANSWER = 2_000, 32_000, 1_000, 5_000, 10_000


def charged(report: UsageReport, limit: Bound, price: ModelPrice) -> Charge:
    attempt = Attempt(
        outcome="ok", charge="known", latency_ms=1, usage=report.usage, other_readings=report.readings[1:],
        usage_doubt=report.doubt, reported_cost_nanousd=report.cost_nanousd, fee_nanousd=report.fee_nanousd,
    )  # fmt: skip
    prices = PriceCatalogue({"m": [DatedPrice(FOREVER_MS, price)]})
    return charge_of(with_costliest_usage(attempt, limit, prices, 0), limit, prices, 0)


def openai(prompt: int, completion: int, **parts: int) -> dict[str, Any]:
    details: dict[str, dict[str, int]] = {"prompt_tokens_details": {}, "completion_tokens_details": {}}
    for name, count in parts.items():
        whole, _, kind = name.partition("_")
        details[f"{whole}_tokens_details"][f"{kind}_tokens"] = count
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}


def modalities(**counts: int) -> list[dict[str, Any]]:
    return [{"modality": kind.upper(), "tokenCount": count} for kind, count in counts.items()]


GEMINI: Final = {
    "promptTokenCount": 1_000, "candidatesTokenCount": 90, "totalTokenCount": 1_090,
    "promptTokensDetails": modalities(text=90, image=500, audio=400, video=10),
    "candidatesTokensDetails": modalities(image=80),
}  # fmt: skip
ALL: Final = {"prompt_image_tokens": 500, "prompt_audio_tokens": 400, "prompt_video_tokens": 10}


@pytest.mark.parametrize(
    ("report", "media_usage"),
    [
        (openai(1_000, 90, prompt_image=500, prompt_audio=400, prompt_video=10, completion_image=80),
         {**ALL, "completion_image_tokens": 80}),
        (GEMINI, {**ALL, "completion_image_tokens": 80}),
        ({"prompt_token_count": 1_000, "candidates_token_count": 90, "total_token_count": 1_090,
          "prompt_tokens_details": [{"modality": "AUDIO", "token_count": 400}, {"modality": "AUDIO", "token_count": 1}],
          "candidates_tokens_details": [{"modality": "AUDIO", "token_count": 9}]},
         {"prompt_audio_tokens": 401, "completion_audio_tokens": 9}),
        ({"input_tokens": 1_000, "output_tokens": 90, "total_tokens": 1_090,
          "input_tokens_details": {"image_tokens": 500, "text_tokens": 500},
          "output_tokens_details": {"image_tokens": "80"}},
         {"prompt_image_tokens": 500, "completion_image_tokens": 80}),
    ],
)  # fmt: skip
def test_tokens_of_media_are_read_in_every_providers_words(report: dict[str, Any], media_usage: dict[str, int]) -> None:
    found = read_usage(report)
    assert found.readings == (MediaUsage(prompt_tokens=1_000, completion_tokens=90, **media_usage),)
    assert found.doubt is None


@pytest.mark.parametrize(
    "report",
    [
        openai(1_000, 90), openai(1_000, 90, prompt_audio=0, completion_image=0),
        {**openai(1_000, 90), "prompt_tokens_details": {"audio_tokens": None, "image_tokens": "many"}},
        {**openai(1_000, 90), "prompt_tokens_details": [{"modality": 7}, "AUDIO"]},
    ],
)  # fmt: skip
def test_a_usage_without_media_is_a_plain_one(report: dict[str, Any]) -> None:
    assert read_usage(report).readings == (Usage(prompt_tokens=1_000, completion_tokens=90),)


def test_each_kind_is_charged_at_its_price_and_not_at_the_most_that_it_could_have_been() -> None:
    """G3: exactly what it cost, where usage and prices tell."""
    limit = bound(message(IMAGE, AUDIO, VIDEO), 100, DEAR, limits=LIMITS)
    report = read_usage(openai(1_000, 90, prompt_image=500, prompt_audio=400, prompt_video=10))
    cost = 90 * TEXT + 500 * PICTURE + 400 * SOUND + 10 * FILM + 90 * ANSWER
    assert charged(report, limit, DEAR) == Charge(cost, "priced", "policy")
    assert cost < limit.amount_nanousd


def test_a_kind_that_the_usage_leaves_out_is_charged_at_its_bound() -> None:
    """G3: servers report zero for what they do not count."""
    limit = bound(message(IMAGE, AUDIO), 100, DEAR, limits=LIMITS)
    surcharges = {"image": 700 * (PICTURE - TEXT), "audio": 900 * (SOUND - TEXT)}
    text = 1_000 * TEXT + 90 * ANSWER
    told_nothing = read_usage(openai(1_000, 90, prompt_image=0, prompt_audio=0))
    assert charged(told_nothing, limit, DEAR).nanousd == text + sum(surcharges.values())
    told_sound = read_usage(openai(1_000, 90, prompt_image=0, prompt_audio=400))
    assert charged(told_sound, limit, DEAR).nanousd == text + 400 * (SOUND - TEXT) + surcharges["image"]


def test_the_price_of_each_image_and_of_a_search_is_charged_too() -> None:
    price = replace(DEAR, image_nanousd=7_000, search_nanousd=9_000)
    limit = bound(
        message(IMAGE, IMAGE), 100, price, limits=LIMITS.model_copy(update={"web_search_tokens": 10}),
        parameters={"web_search_options": {}},
    )  # fmt: skip
    report = read_usage(openai(1_000, 90, prompt_image=500))
    assert charged(report, limit, price).nanousd == 500 * TEXT + 500 * PICTURE + 90 * ANSWER + 2 * 7_000 + 9_000


def test_sound_of_a_video_without_a_price_costs_the_most_that_is_known() -> None:
    price = replace(FLAT, media=(("video", 10**10),))
    limit = bound(message(VIDEO), 100, price, limits=LIMITS)
    report = read_usage(openai(1_000, 90, prompt_video=500, prompt_audio=100))
    assert charged(report, limit, price).nanousd == 400 * TEXT + 600 * 10_000 + 90 * ANSWER


PAINTER: Final = dated_prices("m", [PriceRule.model_validate({"prompt": 2, "completion": 10, "image_output": 30})])


def test_images_that_a_model_made_are_charged_at_their_price_and_its_words_at_theirs() -> None:
    price = PAINTER[0].price
    limit = bound(message(), 2_000, price, parameters={"modalities": ["text", "image"]})
    media_usage = read_usage(openai(100, 1_000, completion_image=900))
    assert charged(media_usage, limit, price) == Charge(100 * TEXT + 100 * ANSWER + 900 * 30_000, "priced", "policy")
    untold = read_usage(openai(100, 1_000))
    assert charged(untold, limit, price) == Charge(100 * TEXT + 1_000 * 30_000, "priced", "policy")


@pytest.mark.parametrize("kind", ["completion_image", "completion_audio"])
def test_what_a_model_made_without_a_price_is_assumed_at_the_bound(kind: str) -> None:
    """G3: it may cost more than text does."""
    limit = bound(message(), 2_000, FLAT)
    media_usage = read_usage(openai(100, 1_000, **{kind: 900}))
    assert charged(media_usage, limit, FLAT) == Charge(limit.amount_nanousd, "assumed")
    reported = read_usage({**openai(100, 1_000, **{kind: 900}), "cost": Decimal("0.5")})
    assert charged(reported, limit, FLAT) == Charge(500_000_000, "reported")


def test_more_tokens_of_media_than_the_prompt_has_were_counted_beside_it() -> None:
    """G3."""
    found = read_usage(openai(100, 90, prompt_audio=400))
    assert found.usage == MediaUsage(prompt_tokens=500, completion_tokens=90, prompt_audio_tokens=400)
    assert found.doubt == "a part of the tokens is larger than the whole"


def test_two_places_of_which_one_tells_more_do_not_differ() -> None:
    plain, media_usage = openai(1_000, 90), openai(1_000, 90, prompt_audio=400)
    for first, second in ((plain, media_usage), (media_usage, plain)):
        found = joined_reports([read_usage(first), read_usage(second)])
        assert (found.readings, found.doubt) == (read_usage(media_usage).readings, None)


counts = st.integers(0, 3_000)
prices = st.integers(0, 50)


@given(
    kinds=st.fixed_dictionaries({kind: st.tuples(counts, counts, counts) for kind in ("text", "image", "audio")}),
    text=st.integers(1, 50), image=prices, audio=prices, discount=st.integers(0, 10), premium=st.integers(0, 10),
)  # fmt: skip
def test_no_usage_is_charged_less_than_its_true_cost(
    kinds: dict[str, tuple[int, int, int]], text: int, image: int, audio: int, discount: int, premium: int
) -> None:
    """G3, whichever of the tokens were read from the cache or written to it: fresh, cached, written of each kind.

    A cache takes off, and adds, the same share of every kind's price; of one that is cheaper than text it may take
    off nothing.
    """
    base = tier_from_usd(
        -1, Decimal(text), Decimal(0), Decimal(text * (10 - discount)) / 10, Decimal(text * (10 + premium)) / 10
    )
    price = ModelPrice("m", (base,), media=(("image", image * 10**9), ("audio", audio * 10**9)))
    true = Decimal(0)
    for kind, own in (("text", text), ("image", image), ("audio", audio)):
        fresh, cached, written = kinds[kind]
        off = discount if own >= text else 0
        true += own * (fresh + cached * Decimal(10 - off) / 10 + written * Decimal(10 + premium) / 10)
    media_usage = {f"prompt_{kind}_tokens": sum(kinds[kind]) for kind in ("image", "audio")}
    usage = MediaUsage(
        prompt_tokens=sum(map(sum, kinds.values())), cached_tokens=sum(each[1] for each in kinds.values()),
        cache_write_tokens=sum(each[2] for each in kinds.values()), **media_usage,
    )  # fmt: skip
    assert price.cost(usage) >= true * 1_000 - 1
    if not usage.cached_tokens and not usage.cache_write_tokens:
        assert price.cost(usage) == true * 1_000


def test_the_result_has_media_tokens_and_the_ledger_only_plain_counts() -> None:
    media_usage = MediaUsage(prompt_tokens=1_000, completion_tokens=90, prompt_audio_tokens=400)
    result = InferenceResult(task_id="t", status=TaskStatus.DONE, usage=media_usage)
    assert InferenceResult.model_validate_json(result.model_dump_json()) == result
    assert '"prompt_audio_tokens":400' in result.model_dump_json()
    plain = InferenceResult(task_id="t", status=TaskStatus.DONE, usage=Usage(prompt_tokens=1))
    assert "audio" not in plain.model_dump_json(), "older readers know no such field"
    assert type(InferenceResult.model_validate_json(plain.model_dump_json()).usage) is Usage
    called: dict[str, Any] = {
        "hold": 1, "model": "m", "outcome": "ok", "latency_ms": 1, "charge_nanousd": 1, "charge_basis": "priced"
    }  # fmt: skip
    assert payload_json(ModelCalled(**called, usage=media_usage)) == payload_json(
        ModelCalled(**called, usage=media_usage.without_media())
    )


def test_the_gateway_reports_media_tokens_in_openais_form() -> None:
    media_usage = MediaUsage(prompt_tokens=9, completion_tokens=9, prompt_audio_tokens=4, completion_image_tokens=5)
    usage = usage_document(InferenceResult(task_id="t", status=TaskStatus.DONE, usage=media_usage))
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0, "audio_tokens": 4}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0, "image_tokens": 5}
