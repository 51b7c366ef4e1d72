"""A policy as a file, and what differs between two, in words."""

from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest

from tollbook.inference.policy_diff import policy_changes
from tollbook.inference.policy_file import read_policy_file
from tollbook.inference.policy_toml import policy_toml
from tollbook.schemas.policy import Policy, default_policy

TEAM: Final = {"name": "team-week", "by": ["team"], "window": "week", "cap_usd": 20}
EVERYTHING: Final[dict[str, Any]] = {
    "timezone": "Europe/Berlin",
    "week_starts_on": "sunday",
    "month_starts_on": 5,
    "plans": {"enterprise": {"cap_usd": "500.5"}},
    "users": {"u42": 100, "joe@example.com": "0.000000001"},
    "tasks": {
        "summarize": {
            "model": "openai/gpt-4o-mini",
            "fallback": ["google/gemini-2.5-flash", {"provider": "openai", "model": "gpt-5-mini"}],
            "cheaper": {"provider": "openai", "model": "gpt-5-nano"},
            "max_tokens": 300,
            "temperature": 0.2,
        }
    },
    "streams": {"emails": {"concurrency": 16}},
    "budgets": [
        TEAM | {"caps": {"red, or not": 40}, "alerts": ["0.5", "1"]},
        {"name": "all", "window": "total", "cap_usd": 0},
    ],
    "prices": {
        "my/model": [{"prompt": "0.5", "completion": "1.5"}, {"prompt": 1, "completion": 2, "from": "2026-12-01"}]
    },
    "providers": {
        "openai": {
            "base_url": "https://api.openai.com/v1",
            "key_env": "OPENAI_API_KEY",
            "dialect": "openai",
            "prices_from": "policy",
            "cost_by_id": False,
            "stream": False,
            "prices": {"gpt-5-mini": [{"prompt": "0.25", "completion": 2}]},
        }
    },
}


# Names as of amounts, what JSON leaves as it is and TOML does not, and an empty list that is not the default.
ODD: Final[dict[str, Any]] = {
    "plans": {"silent": {"cap_usd": 1, "alerts": []}},
    "tasks": {
        "odd": {
            "model": "a/b",
            "max_tokens": 1,
            "params": {
                "stop": ["\x7f", "\n"],
                "response_format": {"prompt": "a", "users": {"x": "b"}, "alerts": ["c"]},
            },
        }
    },
}


@pytest.mark.parametrize(
    "policy",
    [default_policy(), default_policy(EVERYTHING), default_policy(ODD)],
    ids=["defaults", "everything", "odd"],
)
def test_a_policy_written_as_a_file_is_the_same_policy(policy: Policy, tmp_path: Path) -> None:
    file = tmp_path / "tollbook.toml"
    file.write_text(policy_toml(policy))
    assert read_policy_file(file).policy == policy


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"plans": {"trial": {"cap_usd": 3}}}, ["plan trial: cap $5 -> $3"]),
        ({"plans": {"pro": {"cap_usd": Decimal("99.5")}}}, ["plan pro: new, cap $99.5"]),
        ({"users": {"u42": 8}}, ["user u42: new, $8"]),
        (
            {"prices": {"m": {"prompt": 1, "completion": 1, "audio": "2.50"}}},
            ["price of m: new, prompt $1, completion $1, audio $2.5, request $0"],
        ),
        ({"budgets": [TEAM]}, ["budget team-week: new, by team, window week, cap $20"]),
        ({"timezone": "Asia/Tokyo"}, ["time zone: UTC -> Asia/Tokyo"]),
        ({"streams": {"emails": {}}}, ["stream emails: new, without settings of its own"]),
        (
            {"tasks": {"score_post": {"model": "openai/gpt-4o-mini", "max_tokens": 500}}},
            [
                "task type score_post: model anthropic/claude-3-haiku -> openai/gpt-4o-mini",
                "task type score_post: fallback google/gemini-2.5-flash -> none",
                "task type score_post: temperature 0.0 -> none",
            ],
        ),
        (
            {"prices": {"my/model": {"prompt": "0.5", "completion": "1.5"}}},
            ["price of my/model: new, prompt $0.5, completion $1.5, request $0"],
        ),
    ],
)
def test_changes_of_a_policy_are_described_in_words(changes: dict[str, Any], lines: list[str]) -> None:
    assert [each.text for each in policy_changes(default_policy(), default_policy(changes))] == lines


def test_changes_of_providers_are_described_in_words() -> None:
    before = default_policy(EVERYTHING)
    openai = EVERYTHING["providers"]["openai"]
    changed = {
        **EVERYTHING,
        "tasks": {"summarize": {"provider": "openai", "model": "gpt-5-mini", "max_tokens": 300, "temperature": 0.2}},
        "providers": {
            "openai": {**openai, "dialect": "compatible", "prices": {"gpt-5-mini": {"prompt": 1, "completion": 2}}}
        },
    }
    assert [each.text for each in policy_changes(before, default_policy(changed))] == [
        "task type summarize: model openai/gpt-4o-mini -> gpt-5-mini",
        "task type summarize: fallback google/gemini-2.5-flash, gpt-5-mini at openai -> none",
        "task type summarize: cheaper gpt-5-nano at openai -> none",
        "task type summarize: provider none -> openai",
        "provider openai: dialect openai -> compatible",
        "provider openai: price of gpt-5-mini prompt $0.25, completion $2, request $0 -> prompt $1, completion $2, "
        "request $0",
    ]


def test_a_changed_budget_is_described_by_its_changes() -> None:
    before, after = (
        default_policy({"budgets": [TEAM]}),
        default_policy({"budgets": [TEAM | {"window": "month", "cap_usd": 30, "caps": {"red": 40}}]}),
    )
    assert [each.text for each in policy_changes(before, after)] == [
        "budget team-week: window week -> month",
        "budget team-week: cap $20 -> $30",
        "budget team-week: red of caps none -> $40",
    ]
    assert [each.text for each in policy_changes(after, default_policy())] == [
        "budget team-week: removed, was by team, window month, cap $30, caps red $40",
    ]


def test_parameters_with_names_of_amounts_are_shown_unchanged() -> None:
    def policy(word: str) -> Policy:
        params = {"response_format": {"prompt": word, "caps": {"x": word}}}
        return default_policy({"tasks": {"t": {"model": "a/b", "max_tokens": 1, "params": params}}})

    assert [change.text for change in policy_changes(policy("short"), policy("long"))] == [
        "task type t: prompt of response_format of params short -> long",
        "task type t: x of caps of response_format of params short -> long",
    ]
    (new,) = policy_changes(default_policy(), policy("short"))
    assert new.text == "task type t: new, model a/b, max_tokens 1, params response_format prompt short, caps x short"
