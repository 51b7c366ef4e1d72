"""Images, sounds, files, videos, searches, and images that a model makes: bounded where limit and price are known."""

import base64
import json
import struct
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replies import chat_request, reply_of
from tollbook.inference.attempts import Attempt, ChatRequest
from tollbook.inference.bounds import bound
from tollbook.inference.calls.holds import charge_of
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.models import ModelCatalogue, ModelFacts
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, dated_prices, price_from_usd
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.inference.providers.replies import read_reply
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import ModelRule, Policy, PriceRule, default_policy
from tollbook.schemas.tasks import InvalidTask, task_from_fields
from tollbook.schemas.usage import Usage

MTOK = 10**6
FLAT = price_from_usd("m", prompt=Decimal(2), completion=Decimal(10))
DEAR = replace(FLAT, media=(("audio", 32 * 10**9), ("video", 10**9), ("image", 5 * 10**9)))
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "ogg"}}
FILE = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}}
VIDEO = {"type": "video_url", "video_url": "https://x.test/a.mp4"}
IMAGE = {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}


def message(*parts: Any, **more: Any) -> list[Message]:
    return [Message.model_validate({"role": "user", "content": list(parts) or "", **more})]


EMPTY = bound(message(), 100, FLAT)


@pytest.mark.parametrize(
    ("part", "rule", "tokens"),
    [
        (IMAGE, {"image_tokens": 700}, 700),
        (AUDIO, {"audio_tokens": 900}, 900),
        (FILE, {"file_tokens": 5_000}, 5_000),
        ({"type": "file", "file": {"file_id": "file-1"}}, {"file_tokens": 5_000}, 5_000),
        (VIDEO, {"video_tokens": 30_000}, 30_000),
    ],
)
def test_a_part_counts_with_the_most_that_the_policy_says(part: Any, rule: dict[str, int], tokens: int) -> None:
    """G1 G8."""
    price = replace(FLAT, media=(("audio", 10**9), ("video", 10**9)))  # Cheaper than text, so that none costs more.
    found = bound(message(part, part), 100, price, limits=ModelRule(**rule))
    assert found.prompt_tokens == EMPTY.prompt_tokens + 2 * tokens
    assert found.fee_nanousd == 0
    with pytest.raises(PriceUnknown, match="has no upper bound"):
        bound(message(part), 100, price)


def test_the_policys_word_counts_before_what_is_published() -> None:
    price = replace(FLAT, model="openai/gpt-4o")
    published = bound(message(IMAGE), 100, price).prompt_tokens
    assert bound(message(IMAGE), 100, price, limits=ModelRule(image_tokens=9)).prompt_tokens < published


def test_tokens_that_cost_more_are_held_and_charged_at_their_price() -> None:
    """G1 G3."""
    rule = ModelRule(image_tokens=700, audio_tokens=900, video_tokens=30_000)
    parts = (IMAGE, AUDIO, VIDEO)
    found = bound(message(*parts), 100, DEAR, limits=rule)
    text = EMPTY.prompt_tokens
    most = (text + 30_000) * 2_000 + 900 * 32_000 + 700 * 5_000 + 100 * 10_000
    assert most <= found.amount_nanousd <= most + 2_000
    # The report does not say which tokens were sound: at most the bounded ones were.
    used = Usage(prompt_tokens=text + 31_600, completion_tokens=100)
    attempt = Attempt(outcome="ok", charge="known", latency_ms=1, usage=used)
    prices = PriceCatalogue({"m": [DatedPrice(FOREVER_MS, DEAR)]})
    charge = charge_of(attempt, found, prices, 0)
    assert charge.basis == "priced"
    assert most <= charge.nanousd <= found.amount_nanousd


@pytest.mark.parametrize("part", [AUDIO, VIDEO])
def test_sound_and_videos_without_a_price_are_refused(part: Any) -> None:
    """G8: they cost up to twenty times as much as text."""
    with pytest.raises(PriceUnknown, match="have a price that is not known"):
        bound(message(part), 100, FLAT, limits=ModelRule(audio_tokens=9, video_tokens=9))


def wav(seconds: float, *, rate: int = 8_000, bits: int = 16, channels: int = 1, kind: int = 1, lie: int = 1) -> str:
    frame = channels * bits // 8
    data = b"\0" * (round(seconds * rate) * frame)
    head = struct.pack("<HHIIHH", kind, channels, rate, lie * rate * frame, frame, bits)
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return base64.b64encode(b"RIFF" + struct.pack("<I", len(body)) + body).decode()


def sound_tokens(data: str, kind: str, **rule: int) -> int:
    part = {"type": "input_audio", "input_audio": {"data": data, "format": kind}}
    found = bound(message(part), 100, replace(FLAT, media=(("audio", 0),)), limits=ModelRule(**rule))
    return found.prompt_tokens - EMPTY.prompt_tokens


@given(
    seconds=st.floats(0, 3), rate=st.sampled_from([8_000, 16_000, 44_100]), bits=st.sampled_from([8, 16, 24]),
    channels=st.integers(1, 2), lie=st.sampled_from([0, 1, 9]),
)  # fmt: skip
def test_a_wav_has_at_most_the_seconds_that_its_bytes_can_have(
    seconds: float, rate: int, bits: int, channels: int, lie: int
) -> None:
    """G1: whatever its header says of the rate of bytes."""
    data = wav(seconds, rate=rate, bits=bits, channels=channels, lie=lie)
    if lie == 0:
        with pytest.raises(PriceUnknown, match="audio_tokens"):
            sound_tokens(data, "wav", audio_tokens_per_second=10)
        return
    found = sound_tokens(data, "wav", audio_tokens_per_second=10)
    assert seconds * 10 - 1 <= found <= seconds * 10 + 20


def test_a_sound_priced_by_the_second_needs_a_known_format() -> None:
    """G8."""
    frame = b"\xff\xfb"
    for start in (frame, b"ID3"):
        mp3 = base64.b64encode(start.ljust(5_000, b"\0")).decode()
        assert sound_tokens(mp3, "mp3", audio_tokens_per_second=10) == 60
    other_codecs = [base64.b64encode(start * 2_500).decode() for start in (b"\0\0", b"\xff\xf1", b"Og")]
    hidden = base64.b64decode(wav(1))
    hidden = base64.b64encode(hidden[:12] + b"JUNK" + struct.pack("<I", 24) + hidden[12:36] + hidden[12:]).decode()
    for data, kind in (
        (wav(1, kind=2), "wav"), ("AAAA", "wav"), ("AAAA", "flac"), ("not base64!", "mp3"), (hidden, "wav"),
        *((data, "mp3") for data in other_codecs),
    ):  # fmt: skip
        with pytest.raises(PriceUnknown, match="audio_tokens"):
            sound_tokens(data, kind, audio_tokens_per_second=10)
        assert sound_tokens(data, kind, audio_tokens_per_second=10, audio_tokens=7) == 7
    assert sound_tokens(wav(5), "wav", audio_tokens_per_second=10, audio_tokens=7) == 7


def test_media_that_are_cached_cost_more() -> None:
    """G1."""
    marked = {**AUDIO, "cache_control": {"type": "ephemeral"}}
    rule = ModelRule(audio_tokens=1_000)
    plain, cached = (bound(message(part), 100, DEAR, limits=rule).amount_nanousd for part in (AUDIO, marked))
    assert cached - plain >= 1_000 * 32_000 // 4


def test_the_policy_states_limits_and_prices() -> None:
    policy = default_policy(
        {
            "models": {"acme/ear": {"audio_tokens_per_second": 25}},
            "prices": {"acme/ear": {"prompt": 1, "completion": 2, "audio": 10, "image_output": 40, "web_search": 0.01}},
        }
    )
    assert Policy.model_validate(policy.content()) == policy
    prices = PriceCatalogue.of_policy(policy, provider="openrouter")
    price = prices.price("Acme/Ear", 0)
    assert prices.limits("Acme/Ear") == ModelRule(audio_tokens_per_second=25)
    assert (price.media_price("audio"), price.image_output, price.search_nanousd) == (10**10, 4 * 10**10, 10**7)
    assert price.tiers[0].completion_nanousd_per_mtok == 4 * 10**10
    assert "models" not in default_policy().content()  # Policies without any have the digest that they had.


PAPER = dated_prices("m", [PriceRule.model_validate({"prompt": 2, "completion": 10, "file": "0.002"})])[0].price


def test_reading_files_is_priced_by_the_file_where_the_policy_says_so() -> None:
    """G1 G3: held, and charged where the provider reports no cost."""
    rule = ModelRule(file_tokens=5_000)
    plain, priced = (bound(message(FILE, FILE), 100, price, limits=rule) for price in (FLAT, PAPER))
    assert (plain.fee_nanousd, priced.fee_nanousd) == (0, 2 * 2_000_000)
    assert priced.amount_nanousd - plain.amount_nanousd >= 2 * 2_000_000
    used = Usage(prompt_tokens=1_000, completion_tokens=100)
    attempt = Attempt(outcome="ok", charge="known", latency_ms=1, usage=used)
    charge = charge_of(attempt, priced, PriceCatalogue({"m": [DatedPrice(FOREVER_MS, PAPER)]}), 0)
    assert charge.nanousd == 1_000 * 2_000 + 100 * 10_000 + 2 * 2_000_000
    assert bound(message(IMAGE), 100, PAPER, limits=ModelRule(image_tokens=7)).fee_nanousd == 0


@pytest.mark.parametrize(
    ("part", "price", "plugins"),
    [
        (FILE, FLAT, [{"id": "file-parser", "pdf": {"engine": "native"}}]),
        (FILE, None, [{"id": "file-parser", "pdf": {"engine": "native"}}]),
        (FILE, PAPER, None),
        (IMAGE, FLAT, None),
    ],
)
def test_openrouter_reads_no_file_at_a_cost_that_is_not_held(part: Any, price: Any, plugins: object) -> None:
    """G1: its parser bills by the page, beside all prices that can be limited."""
    limits = ModelRule(file_tokens=5_000, image_tokens=7)
    limit = None if price is None else bound(message(part), 100, price, limits=limits)
    request = ChatRequest(model="m", messages=message(part), max_tokens=100, price_limit=limit)
    assert json.loads(ADAPTERS["openrouter"].completion_body(request)).get("plugins") == plugins
    for dialect in ("openai", "compatible"):
        assert "plugins" not in json.loads(ADAPTERS[dialect].completion_body(request))


def test_a_parser_that_a_task_names_is_refused() -> None:
    """G8: before money is held, with the reason."""
    parser = [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]
    fields = {"task": "generate_draft", "user_id": "u1", "messages": [{"role": "user", "content": [FILE]}]}
    with pytest.raises(InvalidTask, match=r"'plugins' cannot be set: .*by the request or the page"):
        task_from_fields({**fields, "plugins": parser})


SEARCHING = {"web_search_options": {"search_context_size": "low"}}


def test_web_searches_are_priced_by_the_request_where_the_policy_allows_it() -> None:
    """G1 G3 G8."""
    priced = replace(FLAT, search_nanousd=10**7)
    bounded = bound(message(), 100, FLAT, parameters={"stop": ["low", "search_context_size"]}).prompt_tokens
    found = bound(message(), 100, priced, parameters=SEARCHING, limits=ModelRule(web_search_tokens=8_000))
    assert found.fee_nanousd == 10**7
    assert found.amount_nanousd >= bounded * 2_000 + 8_000 * 2_000 + 100 * 10_000 + 10**7 - 2_000 * 64
    readable = bound(message(), 100, priced, parameters=SEARCHING, facts=ModelFacts(context_length=5_000))
    assert (readable.prompt_basis == "context_length", readable.prompt_tokens) == (True, 5_000 + 10**7 // 2_000)
    with pytest.raises(PriceUnknown, match="set its web_search_tokens"):
        bound(message(), 100, priced, parameters=SEARCHING)
    with pytest.raises(PriceUnknown, match="the policy has no web_search price"):
        bound(message(), 100, FLAT, parameters=SEARCHING, limits=ModelRule(web_search_tokens=8_000))


PAINTER = ModelCatalogue({"m": ModelFacts(output_modalities=frozenset({"text", "image"}))})
TOKENS_ONLY = {"prompt": 1, "completion": 2}


def test_a_model_that_makes_images_is_refused_unless_the_policy_prices_them() -> None:
    """G8."""
    for rule, is_priced in ((TOKENS_ONLY, False), ({**TOKENS_ONLY, "image_output": 30}, True)):
        prices = PriceCatalogue({"m": dated_prices("m", [PriceRule.model_validate(rule)])}, models=PAINTER)
        assert prices.knows("m", 0) == is_priced
        if is_priced:
            found = bound(message(), 100, prices.price("m", 0), parameters={"modalities": ["text", "image"]})
            assert found.completion_nanousd_per_mtok == 30 * 10**9
    for name in ("modalities", "image_config"):
        with pytest.raises(PriceUnknown, match="no image_output price"):
            bound(message(), 100, FLAT, parameters={name: ["image"]})


@pytest.mark.parametrize("model", ["gemini-nano-banana-2.1", "gemini-omni-flash-preview", "gpt-4o-realtime-preview"])
def test_the_catalogue_prices_no_model_that_bills_other_outputs(model: str) -> None:
    """G8: their names do not say so."""
    with pytest.raises(PriceUnknown, match="it is billed by output_"):
        PriceCatalogue(provider="google" if "gemini" in model else "openai").price(model, 1_790_000_000_000)


def test_images_that_a_model_made_come_back() -> None:
    url = "data:image/png;base64,AAAA"
    said = {"role": "assistant", "content": "", "images": [{"type": "image_url", "image_url": {"url": url}}]}
    body = f'{{"choices": [{{"message": {str(said).replace(chr(39), chr(34))}, "finish_reason": "stop"}}]}}'
    found = read_reply(reply_of(body.encode()), chat_request(), is_insured=True)
    assert (found.outcome, found.images, found.content, found.error_code) == ("ok", (url,), None, None)
