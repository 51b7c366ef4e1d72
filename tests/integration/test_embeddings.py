"""Embeddings: a task kind of its own, from a publisher or an application to the provider and back, paid once."""

import base64
import json
import tomllib
from array import array
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.system import REPLIES, GatedStandIn, RunningSystem, running_system
from tollbook.inference.client import InferenceClient
from tollbook.inference.errors import PlanLimitReached, SettingsError
from tollbook.inference.policy_file import read_policy_file
from tollbook.inference.publisher import new_entry
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.results import ErrorCode, TaskStatus
from tollbook.schemas.tasks import InvalidTask, task_from_fields
from tollbook.standin import FaultPlan, StandInConfig

SMALL: Final = "openai/text-embedding-3-small"
LARGE: Final = "openai/text-embedding-3-large"
POLICY: Final = f"""
[plans.tiny]
cap_usd = 0.0001

[tasks.embed]
kind = "embeddings"
model = "{SMALL}"
params = {{ dimensions = 4 }}

[tasks.embed_twice]
kind = "embeddings"
model = "{LARGE}"
fallback = "{SMALL}"
"""
TEXTS: Final = ("one", "two and a half", "three")


def policy(text: str = POLICY) -> Policy:
    return default_policy(tomllib.loads(text))


@asynccontextmanager
async def embedding(server_url: str, tmp_path: Path, *faults: str, **values: Any) -> AsyncIterator[RunningSystem]:
    (tmp_path / "tollbook.toml").write_text(values.pop("policy", POLICY), encoding="utf-8")
    provider = GatedStandIn(StandInConfig(lists_prices=True, faults=FaultPlan(script=faults)))
    given = {"policy_file": tmp_path / "tollbook.toml", **values}
    async with running_system(tmp_path / "data", server_url, provider=provider, **given) as running:
        yield running


async def run(running: RunningSystem, **task: Any) -> Any:
    entry = new_entry("generation", task.pop("task", "embed"), policy=running.system.runtime.rules, user_id="u1",
                      reply_to=REPLIES, **task)  # fmt: skip
    await running.publish("generation", [entry.fields])
    return (await running.answers([entry.task_id]))[0]


async def test_each_input_gets_its_vector_and_the_prompt_is_paid(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G1 G3."""
    async with embedding(server_url, tmp_path) as running:
        result = await run(running, input=TEXTS)
        assert (result.status, result.error, result.content) == (TaskStatus.DONE, None, None)
        assert [len(vector) for vector in result.embeddings] == [4, 4, 4]
        again = await run(running, input=TEXTS[1], dimensions=4)
        assert again.embeddings == [result.embeddings[1]]
        tokens = 1 + 4 + 2
        assert result.usage.model_dump(exclude_defaults=True) == {"prompt_tokens": tokens}
        assert result.cost_usd == Decimal(tokens * 20) / 10**9
        rows = await running.query(
            "SELECT type, amount_usd, prompt_tokens FROM events WHERE call_id <> '' ORDER BY seq"
        )
        assert [row["type"] for row in rows[:3]] == ["budget-reserved", "model-called", "cost-recorded"]
        held = sum(len(text) + 32 for text in TEXTS) + 128
        assert [row["amount_usd"] for row in rows[:3:2]] == [Decimal(held * 20) / 10**9, result.cost_usd]
        # The provider's own book, whatever it calls the user.
        assert list(running.provider.book.totals().values()) == [(tokens + 4) * 20]


@pytest.mark.slow
async def test_vectors_come_as_base64_where_that_is_asked_for(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with embedding(server_url, tmp_path) as running:
        plain = await run(running, input="one")
        packed = await run(running, input="one", encoding_format="base64")
        numbers = array("f", base64.b64decode(packed.embeddings[0]))
        assert [round(number, 6) for number in numbers] == plain.embeddings[0]


@pytest.mark.slow
async def test_an_application_calls_for_them_itself(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with embedding(server_url, tmp_path) as running:
        runtime = running.system.runtime
        result = await InferenceClient("embed", runtime).call(input=list(TEXTS), user_id="u2")
        assert result.embeddings is not None
        assert len(result.embeddings) == 3
        with pytest.raises(PlanLimitReached):
            await InferenceClient("embed", runtime).call(input="x" * 999_000, user_id="poor", plan="tiny")


@pytest.mark.slow
async def test_a_failed_model_is_followed_by_the_fallback(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with embedding(server_url, tmp_path, "http_404") as running:
        result = await run(running, task="embed_twice", input="one")
        assert (result.status, result.model_used) == (TaskStatus.DONE, SMALL)


async def test_a_paid_reply_of_unknown_cost_is_assumed(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """G3."""
    async with embedding(server_url, tmp_path, "missing_usage") as running:
        result = await run(running, input="one")
        assert result.status is TaskStatus.DONE
        rows = await running.query("SELECT assumed_usd, spent_usd FROM spend")
        assert rows == [{"assumed_usd": result.cost_usd, "spent_usd": result.cost_usd}]
        assert result.cost_usd == Decimal((3 + 32 + 128) * 20) / 10**9


async def test_a_model_is_asked_only_for_what_it_makes(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """G8: the provider lists what each model puts out."""
    async with embedding(server_url, tmp_path) as running:
        chat = await run(running, task="score_post", prompt="hello", model=SMALL)
        assert (chat.status, chat.error_code) == (TaskStatus.FAILED, ErrorCode.PRICE_UNKNOWN)
        assert chat.error.endswith("it makes no text")
        assert running.provider.requests == 0


async def test_a_provider_that_makes_none_is_not_asked(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """G8: before money is held."""
    prices = f'\n[prices."{SMALL}"]\nprompt = 0.02\ncompletion = 0\n'
    async with embedding(server_url, tmp_path, dialect="anthropic", policy=POLICY + prices) as running:
        result = await run(running, input=TEXTS)
        assert (result.status, result.error_code) == (TaskStatus.FAILED, ErrorCode.PRICE_UNKNOWN)
        assert result.error.endswith("it makes no embeddings")
        assert running.provider.requests == 0


@pytest.mark.parametrize(
    ("task", "fields", "problem"),
    [
        ("embed", {"prompt": "x"}, "embed makes embeddings: give 'input' instead of 'prompt' or 'messages'"),
        ("score_post", {"input": "x"}, "'input' is for embeddings, and score_post makes chat completions"),
        ("embed", {"input": "x", "temperature": 0}, "'temperature' is for chat completions, and not for 'input'"),
        ("embed", {"input": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is for chat"),
        ("score_post", {"prompt": "x", "dimensions": 3}, "'dimensions' goes with 'input' only"),
        ("embed", {"input": "x", "prompt": "y"}, "give only one of 'prompt' and 'messages'"),
        ("embed", {"input": []}, "'input' must be a text or a list of 1 to 128 texts"),
        ("embed", {"input": ["x"] * 129}, "'input' must be a text or a list of 1 to 128 texts"),
        ("embed", {"input": ["x", ""]}, "'input[1]' must be text that is not empty"),
        ("embed", {"input": [[1, 2]]}, "'input' must be text or a list of texts, not token ids"),
        ("embed", {"input": "x" * 1_000_001}, "the prompt must have at most 1000000 bytes"),
        ("embed", {"input": "x", "dimensions": 8_193}, "'dimensions' must be"),
        ("embed", {"input": "x", "system": "y"}, "'system' goes with 'prompt' only"),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_it_is_sent(
    task: str, fields: Mapping[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidTask) as caught:
        new_entry("generation", task, policy=policy(), user_id="u1", **fields)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", '["a"]', "[", "plain", "\ud800", '"quoted"'])
def test_a_text_stays_one_text_whatever_it_looks_like(text: str) -> None:
    entry = new_entry("generation", "embed", policy=policy(), user_id="u1", input=text)
    assert task_from_fields(entry.fields).input == (text.replace("\ud800", "\ufffd"),)
    # A list of a plain stream is JSON.
    assert task_from_fields({**entry.fields, "input": json.dumps(["a", "\ud800"])}).input == ("a", "\ufffd")


def test_inputs_are_part_of_the_content() -> None:
    """G4."""
    entries = [new_entry("generation", "embed", policy=policy(), user_id="u1", input=text) for text in ("a", "b", "b")]
    hashes = [task_from_fields(entry.fields).content_hash() for entry in entries]
    assert hashes[0] != hashes[1] == hashes[2]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("max_tokens = 3", "'tasks.embed.max_tokens' is for chat completions"),
        ("temperature = 0.1", "'tasks.embed.temperature' is for chat completions"),
        (f'cheaper = "{LARGE}"', "'cheaper' is not for embeddings"),
        ("params = { top_p = 1 }", "'tasks.embed.params' has an unknown parameter 'top_p'"),
        ('kind = "images"', "'tasks.embed.kind' must be"),
    ],
)
def test_a_route_of_embeddings_has_only_what_they_have(line: str, problem: str, tmp_path: Path) -> None:
    kind = "" if "kind" in line else 'kind = "embeddings"\n'
    (tmp_path / "p.toml").write_text(f'[tasks.embed]\nmodel = "{SMALL}"\n{kind}{line}\n')
    with pytest.raises(SettingsError) as caught:
        read_policy_file(tmp_path / "p.toml")
    assert problem in str(caught.value)
