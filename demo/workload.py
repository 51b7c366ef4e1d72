"""The demo's tasks: realistic sizes; users and task types come from a seed, so that two runs publish the same tasks.

Plans, task types and streams are those of the policy file, or of the default policy.
"""

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import accumulate, cycle, islice
from itertools import product as cartesian
from typing import Final

from tollbook.inference.policy_file import PolicyFile
from tollbook.schemas.identifiers import budget_value
from tollbook.schemas.money import NANOUSD_PER_USD
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.tasks import PING

# For each task type: its stream, and its share of the tasks.
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
# With this many tasks, a few users reach the caps of the real plans.
_TASKS_OF_FULL_CAPS: Final = 15_000
_CENT: Final = NANOUSD_PER_USD // 100
# One call fits even the smallest cap.
_MIN_CAP: Final = 5 * _CENT
_CAMPAIGNS: Final = tuple(f"campaign-{number}" for number in range(1, 13))
# Made-up values of a tag, and the share of tasks that have it.
_TAG_VALUES: Final = 3
_TAGGED: Final = 0.8
# Less than a task costs on average, so that some credit is used up.
_CREDIT_PER_TASK: Final = NANOUSD_PER_USD // 1_000
_MAX_CREDITS: Final = 500
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


@dataclass(frozen=True, slots=True)
class Product:
    """The product whose tasks are published: plans and task types with their shares, and tags with their values."""

    plans: tuple[tuple[str, float], ...] = _PLANS
    mix: tuple[tuple[str, str, float], ...] = _MIX
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @classmethod
    def of_file(cls, file: PolicyFile) -> "Product":
        """Return the product of a policy file: its own plans, task types and streams, or the default ones."""
        policy = file.policy
        plans, streams = _own(file, "plans", policy.plans), _own(file, "streams", policy.streams)
        types = zip(_own(file, "tasks", policy.tasks), cycle(streams))
        return cls(
            plans=tuple((plan, 1.0) for plan in plans),
            mix=tuple((task_type, stream, 1.0) for task_type, stream in types),
            tags={name: _tag_values(policy, name) for name in sorted(policy.tag_names)},
        )

    def values_of(self, attribute: str, users: Sequence[User]) -> tuple[str, ...]:
        """Return the values that an attribute of budgets has in the demo's tasks."""
        values: dict[str, tuple[str, ...]] = {
            "user": tuple(user.user_id for user in users),
            "plan": tuple(plan for plan, _ in self.plans),
            "campaign": _CAMPAIGNS,
            "task": tuple(task_type for task_type, *_ in self.mix if task_type != PING),
        }
        return values.get(attribute) or self.tags.get(attribute, ())


def _own(file: PolicyFile, table: str, known: Iterable[str]) -> list[str]:
    return [name for name in known if file.says(table, name)] or list(known)


def _tag_values(policy: Policy, name: str) -> tuple[str, ...]:
    """Return the values that have a cap of their own, and made-up ones."""
    own = [value for rule in policy.budgets if rule.by == (name,) for value in rule.caps]
    return (*dict.fromkeys(own), *(f"{name}-{number}" for number in range(1, _TAG_VALUES + 1)))


def credits_nanousd(
    policy: Policy, product: Product, users: Sequence[User], tasks: int
) -> Iterator[tuple[str, str | None, int]]:
    """Yield (budget, value, nano-dollars) of credits for prepaid budgets. The last value gets no credit.

    So some calls have credit, some use it up, and some have none.
    """
    for rule in policy.budgets:
        if rule.window != "total" or rule.cap_usd:
            continue
        kept = [product.values_of(name, users) for name in rule.by]
        values = [budget_value(each) for each in islice(cartesian(*kept), _MAX_CREDITS)] if rule.by else [None]
        paid = values[:-1] if len(values) > 1 else values
        for value in paid:
            yield rule.name, value, max(_MIN_CAP, tasks * _CREDIT_PER_TASK // len(paid))


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


def make_users(count: int, seed: int, product: Product) -> list[User]:
    """Return users, those with the most tasks first; their plans are random."""
    draw = random.Random(seed)  # noqa: S311 - a repeatable draw, not a secret.
    plans, weights = [plan for plan, _ in product.plans], [share for _, share in product.plans]
    return [User(f"user-{number:03d}", draw.choices(plans, weights)[0]) for number in range(1, count + 1)]


def make_tasks(count: int, users: list[User], seed: int, product: Product) -> Iterator[Publication]:
    """Yield `count` tasks: users by a Zipf law, types by their shares, sizes from the trace in its own order."""
    draw = random.Random(seed + 1)  # noqa: S311
    ranks = list(accumulate(1 / rank**_ZIPF_EXPONENT for rank in range(1, len(users) + 1)))
    sizes = cycle(read_trace())
    for number in range(count):
        user = draw.choices(users, cum_weights=ranks)[0]
        task_type, stream, _ = draw.choices(product.mix, [share for *_, share in product.mix])[0]
        context_tokens, generated_tokens = next(sizes)
        fields = {
            "task": task_type,
            "user_id": user.user_id,
            "plan": user.plan,
            "task_id": f"demo-{number}",
        }
        if task_type != PING:
            fields["prompt"] = _prompt(number, context_tokens, generated_tokens)
            fields["campaign_id"] = draw.choice(_CAMPAIGNS)
        tags = {name: draw.choice(values) for name, values in product.tags.items() if draw.random() < _TAGGED}
        if tags:
            fields["tags"] = json.dumps(tags)
        yield Publication(stream, fields)


def read_trace() -> list[tuple[int, int]]:
    """Return (context tokens, generated tokens) of each request of the excerpt."""
    text = files("tollbook.demo").joinpath("azure_trace_excerpt.csv").read_text(encoding="ascii")
    return [(int(row["context_tokens"]), int(row["generated_tokens"])) for row in csv.DictReader(text.splitlines())]


def _prompt(number: int, context_tokens: int, generated_tokens: int) -> str:
    """Return a text of the given size. The stand-in counts four bytes a token and follows the mark in brackets."""
    head = f"Task {number}. [[completion_tokens={generated_tokens}]] "
    size = max(len(head), 4 * context_tokens)
    return (head + _FILLER * (size // len(_FILLER) + 1))[:size]
