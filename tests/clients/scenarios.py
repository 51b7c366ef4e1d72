"""What every client has to do, and what the result must be.

A program prints what it saw; what the gateway saw is told by `front.py`, what was paid by the stand-in's book.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.clients.front import Seen

MODEL: Final = "openai/gpt-4o-mini"
EMBEDDINGS_MODEL: Final = "openai/text-embedding-3-small"
FILLER: Final = "[stand-in]"
_TOKENS: Final = 33
RETRIED_TOKENS: Final = 77
"""By this number the book's entries of the retried request are known."""
CITY: Final = {"name": "nothing", "population": 7, "districts": ["nothing"]}
"""The stand-in's first values of the schema that programs ask for."""

PROMPTS: Final = {
    "plain": f"Say hello. [[completion_tokens={_TOKENS}]]",
    "streaming": f"Say hello. [[completion_tokens={_TOKENS}]]",
    "tools": "Which thing is it? [[call=look_up]]",
    "tools_streamed": "Which thing is it? [[call=look_up]]",
    "structured": "Name a city.",
    "structured_streamed": "Name a city.",
    "cap": "Say hello.",
    "cap_streamed": "Say hello.",
    "cut_off": "Say hello. [[fault=stream_reset]]",
    "retry": f"Say hello. [[fault=slow]] [[completion_tokens={RETRIED_TOKENS}]]",
}


@dataclass(frozen=True, slots=True)
class Played:
    """A scenario as a client played it: what it printed, its requests, and how often the retried one was paid."""

    printed: Mapping[str, Any]
    requests: Sequence[Seen]
    paid: int

    @property
    def statuses(self) -> list[int]:
        """The answers' statuses."""
        return [seen.status for seen in self.requests]

    @property
    def failure(self) -> str | None:
        """The class of the exception that the client raised."""
        return self.printed.get("error")


@dataclass(frozen=True, slots=True)
class Scenario:
    """`check` returns what is wrong, '' where nothing is. `cell` is what the table shows."""

    title: str
    check: Callable[[Played], str]
    cell: Callable[[Played], str]


def _answered(played: Played, is_right: bool, statuses: Sequence[int] = (200,)) -> str:
    if played.failure:
        return f"failed with {played.failure}: {played.printed.get('message')}"
    if played.statuses != list(statuses):
        return f"the gateway answered {played.statuses}, not {list(statuses)}"
    return "" if is_right else f"it saw {dict(played.printed)}"


def _plain(played: Played) -> str:
    printed = played.printed
    return _answered(played, FILLER in str(printed.get("text")) and printed.get("tokens") in (_TOKENS, None))


def _streaming(played: Played) -> str:
    return _plain(played) or ("" if played.printed["parts"] > 1 else "the answer came in one part")


def _tools(played: Played) -> str:
    printed = played.printed
    is_right = printed.get("called") == {"look_up": {"id": 7}} and FILLER in str(printed.get("text"))
    return _answered(played, is_right, (200, 200))


def _tools_streamed(played: Played) -> str:
    return _answered(played, played.printed.get("called") == {"look_up": {"id": 7}}, [200] * len(played.requests))


def _structured(played: Played) -> str:
    return _answered(played, played.printed.get("parsed") == CITY, [200] * len(played.requests))


def _refused(played: Played) -> str:
    if played.failure is None:
        return f"it did not fail: {dict(played.printed)}"
    if played.statuses != [402]:
        return f"a refusal must cost one request; the gateway answered {played.statuses}"
    return ""


def _cut_off(played: Played) -> str:
    is_noticed = played.failure is not None or played.printed.get("finish") == "error"
    if not is_noticed:
        return f"it took the half answer for a whole one: {dict(played.printed)}"
    return "" if played.statuses == [200] else f"the gateway answered {played.statuses}, not [200]"


def _retried(played: Played) -> str:
    is_answer = FILLER in str(played.printed.get("text")) or played.printed.get("parsed") == CITY
    wrong = _answered(played, is_answer, (0, 200))
    return wrong or ("" if played.paid == 1 else f"it was paid {played.paid} times")


def _embeddings(played: Played) -> str:
    return _answered(played, played.printed.get("vectors") == 2)


def _yes(_: Played) -> str:
    return "yes"


def _exception(played: Played) -> str:
    requests = len(played.requests)
    return f"`{played.failure}`, {requests} request{'s' if requests > 1 else ''}"


def _noticed(played: Played) -> str:
    return f"`{played.failure}`" if played.failure else "`finish_reason`: error"


def _joined(played: Played) -> str:
    return "paid once" if played.paid == 1 else f"paid {played.paid} times"


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "plain": Scenario("whole", _plain, _yes),
    "streaming": Scenario("streamed", _streaming, _yes),
    "tools": Scenario("tools", _tools, _yes),
    "tools_streamed": Scenario("tools, streamed", _tools_streamed, _yes),
    "structured": Scenario("structured output", _structured, _yes),
    "structured_streamed": Scenario("structured, streamed", _structured, _yes),
    "embeddings": Scenario("embeddings", _embeddings, _yes),
    "cap": Scenario("at the cap", _refused, _exception),
    "cap_streamed": Scenario("at the cap, streamed", _refused, _exception),
    "cut_off": Scenario("stream cut off", _cut_off, _noticed),
    "retry": Scenario("connection lost", _retried, _joined),
}
