"""The demo's tasks: real sizes, seeded users and types, so that two runs publish the same."""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate, cycle
from typing import Final

from tollbook.schemas.money import NANOUSD_PER_USD
from tollbook.schemas.policy import default_policy
from tollbook.schemas.tasks import PING

# One line a task type: the stream it comes by and its share of the tasks.
_MIX: Final = (
    ("generate_draft", "generation", 0.58),
    ("classify_archetype", "analysis", 0.15),
    ("score_post", "monitoring", 0.12),
    ("extract_patterns", "scraping", 0.14),
    (PING, "monitoring", 0.01),
)
_PLANS: Final = (("trial", 0.55), ("starter", 0.30), ("growth", 0.15))
# Steep enough that a few users reach their caps, whatever their plan.
_ZIPF_EXPONENT: Final = 1.25
# So many tasks spend enough for a few users to reach the caps of the real plans.
_TASKS_OF_FULL_CAPS: Final = 15_000
_CENT: Final = NANOUSD_PER_USD // 100
# One call fits even the smallest cap.
_MIN_CAP: Final = 5 * _CENT
_FILLER: Final = "The ledger remembers what the invoice forgets. "


@dataclass(frozen=True, slots=True)
class User:
    """A made-up user."""

    user_id: str
    plan: str


@dataclass(frozen=True, slots=True)
class Publication:
    """One task as it is published: a stream and plain fields."""

    stream: str
    fields: dict[str, str]


def plan_caps_nanousd(tasks: int) -> dict[str, int]:
    """Return the plans' caps for a demo with this number of tasks, in whole cents: smaller demos have smaller caps.

    So some users reach their caps in a demo of any size.
    """
    part = min(tasks, _TASKS_OF_FULL_CAPS)
    caps = default_policy().plan_caps_nanousd
    return {plan: max(_MIN_CAP, cap * part // _TASKS_OF_FULL_CAPS // _CENT * _CENT) for plan, cap in caps.items()}


def count_users(tasks: int) -> int:
    """Return how many users share the tasks: fewer in a small demo, so that each has several."""
    return min(200, max(4, tasks // 75))


def make_users(count: int, seed: int) -> list[User]:
    """Return users in the order of how much they will ask for; their plans are drawn."""
    draw = random.Random(seed)  # noqa: S311 - a repeatable draw, not a secret.
    plans, weights = [plan for plan, _ in _PLANS], [share for _, share in _PLANS]
    return [User(f"user-{number:03d}", draw.choices(plans, weights)[0]) for number in range(1, count + 1)]


def make_tasks(count: int, users: list[User], seed: int) -> Iterator[Publication]:
    """Yield `count` tasks: users by a Zipf law, types by their shares, sizes from the trace in its own order."""
    draw = random.Random(seed + 1)  # noqa: S311
    ranks = list(accumulate(1 / rank**_ZIPF_EXPONENT for rank in range(1, len(users) + 1)))
    sizes = cycle(read_trace())
    for number in range(count):
        user = draw.choices(users, cum_weights=ranks)[0]
        task_type, stream, _ = draw.choices(_MIX, [share for *_, share in _MIX])[0]
        context_tokens, generated_tokens = next(sizes)
        fields = {
            "task": task_type,
            "user_id": user.user_id,
            "plan": user.plan,
            "task_id": f"demo-{number}",
        }
        if task_type != PING:
            fields["prompt"] = _prompt(number, context_tokens, generated_tokens)
            fields["campaign_id"] = f"campaign-{draw.randint(1, 12)}"
        yield Publication(stream, fields)


def read_trace() -> list[tuple[int, int]]:
    """Return (context tokens, generated tokens) of each request of the excerpt."""
    text = files("tollbook.demo").joinpath("azure_trace_excerpt.csv").read_text(encoding="ascii")
    return [(int(row["context_tokens"]), int(row["generated_tokens"])) for row in csv.DictReader(text.splitlines())]


def _prompt(number: int, context_tokens: int, generated_tokens: int) -> str:
    """Make a text of the given size; the stand-in counts four bytes a token and obeys the mark in brackets."""
    head = f"Task {number}. [[completion_tokens={generated_tokens}]] "
    size = max(len(head), 4 * context_tokens)
    return (head + _FILLER * (size // len(_FILLER) + 1))[:size]
