"""What the gate refuses as a programming error changes nothing, whichever argument or key is at fault."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tests.gate_bench import GateBench, open_bench
from tollbook.schemas.money import MAX_NANOUSD

OWN = "user:u:2026-11"
DAY = ("day:u:2026-11-05", 10)

# Each command is sent to a ledger on which it would have all its effects.
COMMANDS: dict[str, dict[str, Any]] = {
    "reserve": {"call": "new", "amount": 2, "further": [DAY]},
    "record": {"call": "open", "extension": 1, "further": [DAY]},
    "note": {"call": "open"},
    "settle": {"call": "open", "attempt_events": ("model-called",), "budgets": (OWN, DAY[0])},
    "adjust": {"call": "closed", "cost": 2, "attempt_events": ("model-called",), "result": "{}"},
    "release": {"call": "closed"},
    "charge": {"call": "new", "budgets": (OWN, DAY[0])},
    "assign": {"command": "new"},
    "credit": {"command": "new", "kind": "credit-granted"},
    "withdraw": {"command": "new"},
    "balance": {},
}

# Name of a number and its place among the arguments, counted from 1 as in the gate's own comments; a pair where
# several values share an argument.
Place = int | tuple[int, int]
AMOUNTS: list[tuple[str, str, Place]] = [
    ("reserve", "amount", (3, 5)),
    ("record", "spent", 5),
    ("record", "assumed", 6),
    ("record", "extension", 7),
    ("settle", "cost", (3, 2)),
    ("settle", "assumed", (3, 3)),
    ("adjust", "cost", 4),
    ("adjust", "assumed", 5),
    ("charge", "cost", 6),
    ("charge", "assumed", 7),
    ("assign", "cap", 8),
    ("credit", "credit", 8),
    ("release", "amount", 6),
    ("withdraw", "credit", 7),
]
INTEGERS: list[tuple[str, str, Place]] = [
    ("reserve", "lease", (3, 6)),
    ("reserve", "valid from", (3, 7)),
    ("reserve", "valid until", (3, 8)),
    ("record", "attempts begun", 4),
    ("record", "number of events", 8),
    ("record", "attempt of an event", 10),
    ("note", "attempt", 3),
    ("settle", "attempt", (3, 4)),
    ("settle", "number of events", (3, 8)),
    ("settle", "attempt of an event", 7),
    ("adjust", "attempt", 6),
    ("adjust", "number of events", 10),
    ("adjust", "attempt of an event", 14),
    ("release", "attempt", 5),
]
SECONDS: list[tuple[str, str, Place]] = [
    ("reserve", "call ttl", (3, 10)),
    ("settle", "result ttl", (3, 6)),
    ("settle", "call ttl", (3, 7)),
    ("adjust", "result ttl", 8),
    ("adjust", "call ttl", 11),
    ("charge", "call ttl", 8),
    ("assign", "command ttl", 9),
    ("release", "call ttl", 7),
    ("withdraw", "command ttl", 8),
]
EVENT_KINDS = [("record", 9), ("settle", 6), ("adjust", 13)]
NOT_INTEGERS = ("", "x", "1.5", "nan", "inf", "-inf", str(2**53))
NOT_BUDGETS = (
    "", "10", "10 0 0 0 0", "-1 0 0 0 0 0", "1.5 0 0 0 0 0", "x 0 0 0 0 0", f"{MAX_NANOUSD + 1} 0 0 0 0 0",
    f"10 {2**53} 0 0 0 0", "10 nan 0 0 0 0", "10 0 0 0 0 0 0",
)  # fmt: skip


@pytest.fixture
async def bench(every_redis_client: Redis) -> AsyncIterator[GateBench]:
    async with open_bench(every_redis_client) as bench:
        await bench.reserve("open", 4, further=[DAY])
        await bench.reserve("closed", 4)
        await bench.settle("closed", 3, assumed=1, final=False)
        yield bench


async def _command(bench: GateBench, name: str) -> list[Any]:
    """The command as it is sent: FCALL function number-of-keys keys arguments."""
    return await bench.capture("assign" if name == "credit" else name, **COMMANDS[name])


def _place(command: list[Any], argument: int) -> int:
    return 3 + command[2] + argument - 1


def _put(command: list[Any], place: Place, value: str) -> None:
    argument, number = place if isinstance(place, tuple) else (place, 0)
    at = _place(command, argument)
    if number:
        numbers = str(command[at]).split(" ")
        numbers[number - 1] = value
        value = " ".join(numbers)
    command[at] = value


async def _is_refused(bench: GateBench, command: list[Any], match: str) -> None:
    before = await bench.everything()
    with pytest.raises(ResponseError, match=match):
        await bench.pipeline.execute(*command)
    assert await bench.everything() == before


@pytest.mark.parametrize("name", COMMANDS)
async def test_each_command_is_accepted_unchanged(bench: GateBench, name: str) -> None:
    """Otherwise the tests below would find refusals for another reason."""
    reply = await bench.pipeline.execute(*await _command(bench, name))
    assert reply[0] == b"OK"


@pytest.mark.parametrize(("name", "what", "argument"), AMOUNTS)
async def test_an_amount_is_an_integer_from_zero_to_a_million_dollars(
    bench: GateBench, name: str, what: str, argument: Place
) -> None:
    for value in (*NOT_INTEGERS, "-1", str(MAX_NANOUSD + 1)):
        command = await _command(bench, name)
        _put(command, argument, value)
        await _is_refused(bench, command, "TOLLBOOK")


@pytest.mark.parametrize(("name", "what", "argument"), INTEGERS)
async def test_a_number_is_an_exact_integer(bench: GateBench, name: str, what: str, argument: Place) -> None:
    for value in NOT_INTEGERS:
        command = await _command(bench, name)
        _put(command, argument, value)
        await _is_refused(bench, command, "TOLLBOOK")


@pytest.mark.parametrize(("name", "what", "argument"), SECONDS)
async def test_a_time_to_live_is_a_positive_integer(bench: GateBench, name: str, what: str, argument: Place) -> None:
    for value in ("", "x", "0", "-1", "1.5"):
        command = await _command(bench, name)
        _put(command, argument, value)
        await _is_refused(bench, command, "TOLLBOOK")


@pytest.mark.parametrize(("name", "argument"), EVENT_KINDS)
async def test_only_events_of_attempts_come_with_a_call(bench: GateBench, name: str, argument: int) -> None:
    for value in ("", "cost-recorded", "budget-reserved"):
        command = await _command(bench, name)
        command[_place(command, argument)] = value
        await _is_refused(bench, command, "TOLLBOOK not an event of an attempt")


@pytest.mark.parametrize("name", ["reserve", "record", "charge", "balance"])
async def test_a_budget_that_cannot_be_read_is_refused(bench: GateBench, name: str) -> None:
    for value in NOT_BUDGETS:
        command = await _command(bench, name)
        command[-1] = f"{value} {DAY[0]}"
        await _is_refused(bench, command, "TOLLBOOK")


async def test_a_budget_of_a_name_that_no_task_can_have_is_checked(bench: GateBench) -> None:
    """The readiness check uses such a name, which has a space in it."""
    command = await _command(bench, "balance")
    command[-1] = "10 0 0 0 0 0 user: ready?:2026-11"
    assert (await bench.pipeline.execute(*command))[0] == b"OK"


@pytest.mark.parametrize("name", COMMANDS)
async def test_too_few_keys_are_refused(bench: GateBench, name: str) -> None:
    complete = await _command(bench, name)
    for missing in range(1, complete[2] + 1):
        command = list(complete)
        command[2] -= missing
        del command[3 + command[2] : 3 + complete[2]]
        await _is_refused(bench, command, ".")


@pytest.mark.parametrize("name", ["reserve", "record", "charge", "balance"])
async def test_a_budget_without_its_baseline_is_refused(bench: GateBench, name: str) -> None:
    command = await _command(bench, name)
    command[-1] = command[-1].rpartition(" ")[2]
    await _is_refused(bench, command, "TOLLBOOK a budget without its baseline")


@pytest.mark.parametrize("name", COMMANDS)
async def test_a_key_of_a_wrong_type_changes_nothing(bench: GateBench, name: str) -> None:
    command = await _command(bench, name)
    for key in command[3 : 3 + command[2]]:
        if key.startswith(bench.keys.result("")) or (name, key) == ("reserve", bench.keys.waiters):
            continue  # Results are only written over; nobody waits here.
        kept = await bench.redis.dump(key)
        await bench.redis.delete(key)
        await bench.redis.sadd(key, "not what should be here")
        await _is_refused(bench, command, "WRONGTYPE")
        await bench.redis.delete(key)
        if kept is not None:
            await bench.redis.restore(key, 0, kept)
