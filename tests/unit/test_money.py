"""Money: integers of nano-dollars, rounded up, bounded, and never a float."""

from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tollbook.inference.errors import describe_shortage
from tollbook.inference.prices.model_price import price_from_usd
from tollbook.inference.setting_tables import CapTable
from tollbook.schemas.events import Event, FallbackUsed
from tollbook.schemas.money import (
    MAX_NANOUSD,
    NANOUSD_PER_USD,
    MoneyError,
    check_nanousd,
    format_usd,
    nanousd_from_usd,
    usd_from_nanousd,
)

LARGEST_EXACT_IN_LUA = 2**53


@pytest.mark.parametrize(
    ("usd", "nanousd"),
    [
        (0, 0),
        (1, 1_000_000_000),
        ("0.25", NANOUSD_PER_USD // 4),
        (Decimal("0.000000001"), 1),
        (Decimal("0.0000000001"), 1),
        (Decimal("0.0000000010"), 1),
        (Decimal("0.0000000011"), 2),
        (Decimal("1e-400"), 1),
        (Decimal("-0"), 0),
        (Decimal("1.5E+3"), 1_500 * NANOUSD_PER_USD),
        ("0.000795", 795 * NANOUSD_PER_USD // 1_000_000),
        ("0.1", NANOUSD_PER_USD // 10),
        ("1." + 150 * "0" + "1", NANOUSD_PER_USD + 1),
        (1_000_000, MAX_NANOUSD),
        ("1000000.000000000", MAX_NANOUSD),
    ],
)
def test_dollars_become_nanodollars_rounded_up(usd: Decimal | str | int, nanousd: int) -> None:
    assert nanousd_from_usd(usd) == nanousd


@pytest.mark.parametrize(
    "usd",
    [
        0.1, float("nan"), float("inf"), True, False, None, b"1", [], 1j,
        Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal("-Infinity"), "nan", "inf", "", "x", "1,5", "$1",
        -1, "-0.000000001", Decimal("1000000.000000001"), 1_000_001, Decimal("1e400"), Decimal("1e999999"),
    ],
)  # fmt: skip
def test_what_is_no_amount_of_dollars_is_refused(usd: Any) -> None:
    with pytest.raises(MoneyError):
        nanousd_from_usd(usd)


@given(st.decimals(min_value=0, max_value=1_000_000, allow_nan=False, allow_infinity=False))
def test_rounding_is_up_by_less_than_a_nanodollar(usd: Decimal) -> None:
    assert nanousd_from_usd(usd) == ceil(Fraction(usd) * NANOUSD_PER_USD)


@given(st.integers(0, MAX_NANOUSD))
def test_every_amount_survives_the_way_to_dollars_and_back(nanousd: int) -> None:
    usd = usd_from_nanousd(nanousd)
    assert nanousd_from_usd(usd) == nanousd
    assert nanousd_from_usd(str(usd)) == nanousd
    assert usd.as_tuple().exponent == -9


def test_the_callers_decimal_context_changes_nothing() -> None:
    with localcontext() as context:
        context.prec = 3
        assert nanousd_from_usd("123456.789012345") == 123_456_789_012_345
        assert str(usd_from_nanousd(123_456_789_012_345)) == "123456.789012345"
        assert format_usd(123_456_789_012_345) == "$123,456.79"


@pytest.mark.parametrize("value", [0, 1, MAX_NANOUSD])
def test_an_amount_within_bounds_is_returned(value: int) -> None:
    assert check_nanousd(value) == value


@pytest.mark.parametrize("value", [-1, MAX_NANOUSD + 1, True, False, 1.0, "1", Decimal(1), None])
def test_an_amount_that_is_no_bounded_integer_is_refused(value: Any) -> None:
    with pytest.raises(MoneyError, match="hold must be"):
        check_nanousd(value, name="hold")


@pytest.mark.parametrize(
    "value", [True, False, 1.0, 0.1, float("nan"), float("inf"), Decimal(1), Decimal("NaN"), "1", None]
)
def test_only_whole_nanodollars_become_dollars(value: Any) -> None:
    for convert in (usd_from_nanousd, format_usd):
        with pytest.raises(MoneyError, match="nano-dollars must be a whole number, not "):
            convert(value)


@pytest.mark.parametrize("name", ["prompt", "completion", "cached", "cache_write", "request"])
@pytest.mark.parametrize("value", [0.1, True, Decimal("NaN"), Decimal("Infinity"), Decimal(-1), "-0.1"])
def test_a_price_that_is_no_amount_is_refused(name: str, value: Any) -> None:
    with pytest.raises(MoneyError, match="dollars must be"):
        price_from_usd("m", **({"prompt": Decimal(1), "completion": Decimal(1)} | {name: value}))


@pytest.mark.parametrize("value", [0.1, True, "1", -1, Decimal(1), MAX_NANOUSD + 1])
def test_a_cap_that_is_no_amount_is_refused(value: Any) -> None:
    tables: list[dict[str, Any]] = [{"users": {"u1": value}}, {"plans": {"trial": value}}]
    for caps in tables:
        with pytest.raises(MoneyError, match=r"the cap of (user u1|plan trial) must be a whole number of nano-dollars"):
            CapTable(**caps)


@pytest.mark.parametrize("name", ["amount", "committed"])
@pytest.mark.parametrize("value", [0.1, True, "1", Decimal(1), float("nan")])
def test_an_event_holds_whole_nanodollars(name: str, value: Any) -> None:
    fields = {"id": "1-0", "v": 1, "seq": 1, "user_id": "u", "period": "2026-11", "call_id": "c", "attempt": 0}
    amounts = {"amount": 0, "committed": 0, name: value}
    payload = FallbackUsed(from_model="a", to_model="b", reason="timeout")
    with pytest.raises(ValidationError):
        Event.model_validate({**fields, **amounts, "payload": payload})


def test_a_minimum_may_be_asked_for() -> None:
    with pytest.raises(MoneyError, match="from 1 to"):
        check_nanousd(0, minimum=1)


def test_sums_of_the_largest_amounts_stay_exact_in_lua() -> None:
    """The gate adds a balance, holds and an amount, each at most MAX_NANOUSD."""
    assert 9 * MAX_NANOUSD < LARGEST_EXACT_IN_LUA


@pytest.mark.parametrize(
    ("nanousd", "places", "text"),
    [
        (0, 2, "$0.00"),
        (0, 9, "$0.000000000"),
        (0, None, "$0.00"),
        (-1_234_500_000, None, "-$1.2345"),
        (1, 2, "$0.01"),
        (10_000_000, 2, "$0.01"),
        (10_000_001, 2, "$0.02"),
        (1_234_567_890_000, 2, "$1,234.57"),
        (1_500, 6, "$0.000002"),
        (1_500, 9, "$0.000001500"),
        (-1, 2, "-$0.01"),
        (MAX_NANOUSD, 0, "$1,000,000"),
        (4, 9, "$0.000000004"),
    ],
)
def test_people_never_see_a_spend_too_low(nanousd: int, places: int | None, text: str) -> None:
    assert format_usd(nanousd, places=places) == text


def test_a_refusal_shows_the_exact_cap() -> None:
    text = describe_shortage(
        "user:u1:2026-11", requested_nanousd=30_604_000, settled_nanousd=0, held_nanousd=0, cap_nanousd=1_000_000
    )
    assert "the cap of $0.001, " in text
