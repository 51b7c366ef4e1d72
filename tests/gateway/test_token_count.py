"""Counts of tokens: the true one where the tokenizer is known and the texts are plain, else an estimate."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.golden import load
from tollbook.gateway.messages.token_count import count_tokens
from tollbook.gateway.token_estimate import estimate_tokens
from tollbook.schemas.tasks import InvalidTask

ROOT = Path(__file__).resolve().parents[2]
HELLO = {"role": "user", "content": "hello there"}
TEXTS = {
    "prose": "docs/guarantees.md",
    "python": "inference/bounds.py",
    "lua": "ledger/gate/functions/ledger.lua",
    "json": "tests/golden/gateway/transcripts/responses-mixed-calls.json",
    "license": "LICENSE",
    "lock": "uv.lock",
}
OTHER_SCRIPTS = {
    "german": "Die Regierung hat am Mittwoch beschlossen, kleinere Unternehmen im kommenden Jahr stärker zu fördern.",
    "russian": "Правительство в среду приняло решение значительно расширить поддержку небольших предприятий.",
    "chinese": "政府周三决定在明年大幅扩大对可再生能源的支持力度。此举主要是为了帮助小型企业。",
    "japanese": "政府は水曜日、来年の再生可能エネルギーへの支援を大幅に拡大することを決定した。",
    "korean": "정부는 수요일 내년에 재생 에너지에 대한 지원을 크게 확대하기로 결정했다.",
    "arabic": "قررت الحكومة يوم الأربعاء توسيع الدعم للطاقة المتجددة بشكل كبير في العام المقبل.",
    "hindi": "सरकार ने बुधवार को अगले वर्ष नवीकरणीय ऊर्जा के लिए समर्थन को काफी बढ़ाने का निर्णय लिया।",
}


@cache
def encoding(name: str) -> Any:
    import bpe_openai  # It takes a second to load, in every process that collects.

    return bpe_openai.get_encoding(name)


def true_count(text: str, name: str = "o200k_base") -> int:
    return len(encoding(name).encode(text))


@pytest.mark.parametrize("name", list(TEXTS))
def test_estimates_of_prose_code_and_data_are_at_most_a_fifth_too_high(name: str) -> None:
    text = (ROOT / TEXTS[name]).read_text(encoding="utf-8")[:200_000]
    assert 0.95 <= estimate_tokens(text) / true_count(text) <= 1.2


@pytest.mark.parametrize("name", list(OTHER_SCRIPTS))
def test_estimates_of_other_scripts_lie_between_the_tokenizers(name: str) -> None:
    text = OTHER_SCRIPTS[name]
    assert true_count(text) <= estimate_tokens(text) * 1.05
    assert estimate_tokens(text) <= true_count(text, "cl100k_base") * 1.05


def test_plain_texts_are_counted_as_the_model_does() -> None:
    """Of the arithmetic that OpenAI publishes: 3 for the answer, and of each message 3 and its role."""
    body = {"model": "openai/gpt-4o", "system": "Be brief.", "messages": [HELLO]}
    expected = 3 + 4 + true_count("Be brief.") + 4 + true_count("hello there")
    assert count_tokens(body, true_count) == (expected, False)


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {
            "messages": [
                HELLO,
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ]
        },
        {
            "messages": [
                HELLO,
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
                    ],
                },
            ]
        },
    ],
    ids=["tools", "schema", "parts", "image"],
)
def test_all_else_is_an_estimate_that_counts_it(more: dict[str, Any]) -> None:
    plain, _ = count_tokens({"model": "m", "messages": [HELLO]}, true_count)
    tokens, is_estimate = count_tokens({"model": "m", "messages": [HELLO], **more}, true_count)
    assert is_estimate
    assert tokens > plain


def test_tools_have_the_instructions_before_them() -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    plain, _ = count_tokens({"model": "m", "messages": [HELLO]})
    tokens, _ = count_tokens({"model": "m", "messages": [HELLO], "tools": tools})
    assert tokens > plain + 313  # The fewest that Anthropic publishes.


def test_texts_whose_count_is_not_certain_are_estimated() -> None:
    tokens, is_estimate = count_tokens({"model": "m", "messages": [HELLO]}, lambda _text: None)
    assert is_estimate
    assert tokens == count_tokens({"model": "m", "messages": [HELLO]})[0]


def test_a_longer_document_has_more_tokens() -> None:
    def tokens_of(size: int) -> int:
        source = {"type": "base64", "media_type": "application/pdf", "data": "A" * size}
        message = {"role": "user", "content": [{"type": "document", "source": source}]}
        return count_tokens({"model": "m", "messages": [message]})[0]

    assert tokens_of(400) < tokens_of(400_000) < tokens_of(800_000)


def test_requests_of_agents_are_counted_without_their_limit_and_stream() -> None:
    body = load("bodies", "messages-claude-code-adaptive")
    tokens, is_estimate = count_tokens(body)
    assert is_estimate
    assert (tokens, is_estimate) == count_tokens({k: v for k, v in body.items() if k not in ("max_tokens", "stream")})


def test_wrong_requests_are_refused_as_completions_are() -> None:
    with pytest.raises(InvalidTask, match="'messages' is missing"):
        count_tokens({"model": "m"})
    with pytest.raises(InvalidTask, match="must not be empty"):
        count_tokens({"model": "m", "messages": []})


def test_no_text_has_no_tokens() -> None:
    assert estimate_tokens("") == 0
