"""What a reply says about tokens and money: counts and amounts, or nothing; never a guess."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollbook.inference.providers.bodies import read_json
from tollbook.inference.providers.usage_report import read_cost, read_usage
from tollbook.schemas.money import MAX_NANOUSD, MoneyError, nanousd_from_usd
from tollbook.schemas.usage import Usage

TOKENS = {"prompt_tokens": 100, "completion_tokens": 50}


def read(**fields: Any) -> tuple[Usage | None, int | None, bool]:
    report = read_usage({**TOKENS, **fields})
    return report.usage, report.cost_nanousd, report.doubt is not None


def test_fee_of_ones_own_key_is_known_where_the_rest_is_not() -> None:
    assert read_usage({**TOKENS, "is_byok": True, "cost": 1}).fee_nanousd == 1_000_000_000


@pytest.mark.parametrize("reported", [None, [], "usage", 7, True, Decimal(1)])
def test_usage_that_is_not_an_object_is_ignored(reported: object) -> None:
    report = read_usage(reported)
    assert (report.usage, report.cost_nanousd, report.doubt) == (None, None, None)


@pytest.mark.parametrize(
    ("cost", "nanousd"),
    [
        (0, 0),
        (Decimal("0.0"), 0),
        (Decimal("-0.0"), 0),
        (1, 1_000_000_000),
        (Decimal("0.000000001"), 1),
        # Rounded up: a part of a nano-dollar is not given away.
        (Decimal("0.0000000001"), 1),
        (Decimal("1.0000000001"), 1_000_000_001),
        ("0.25", 250_000_000),
        (1_000_000, MAX_NANOUSD),
        (None, None),
    ],
)
def test_cost_is_read_exactly(cost: object, nanousd: int | None) -> None:
    assert read_cost(cost) == nanousd
    assert read(cost=cost)[1:] == (nanousd, False)


@pytest.mark.parametrize(
    "cost",
    [
        True, False, 0.5, -1, Decimal("-0.1"), Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), 1_000_001,
        Decimal("1e999999"), "a lot", "", [], {}, b"1",
    ],
)  # fmt: skip
def test_absurd_cost_is_ignored_and_the_usage_counts(cost: object) -> None:
    with pytest.raises(MoneyError):
        read_cost(cost)
    assert read(cost=cost) == (Usage(**TOKENS), None, True)


@pytest.mark.parametrize(
    "fields",
    [{"cost": Decimal("0.5"), "currency": "EUR"}, {"cost": {"total_cost": Decimal("0.5"), "currency": "CNY"}}],
)
def test_cost_of_another_currency_is_not_taken_for_dollars(fields: dict[str, Any]) -> None:
    assert read(**fields) == (Usage(**TOKENS), None, True)
    assert read(currency="EUR") == (Usage(**TOKENS), None, False)
    assert read(cost=Decimal("0.5"), currency="USD")[1:] == (500_000_000, False)


@pytest.mark.parametrize("count", [None, True, "ten", "1.5", Decimal("1.5"), Decimal("NaN"), -1, 1_000_000_001, [], {}])
@pytest.mark.parametrize("name", TOKENS)
def test_usage_with_a_malformed_count_has_only_its_cost(name: str, count: object) -> None:
    assert read(**{name: count}, cost=Decimal("0.5")) == (None, 500_000_000, False)


@pytest.mark.parametrize(
    ("details", "cached", "written"),
    [
        ({"cached_tokens": 40}, 40, 0),
        ({"cached_tokens": 40, "cache_write_tokens": 10}, 40, 10),
        ({"cached_tokens": "40"}, 40, 0),
        ({"cached_tokens": Decimal("40.0"), "cache_write_tokens": Decimal(10)}, 40, 10),
        ({"cached_tokens": -1}, 0, 0),
        ({"cached_tokens": True}, 0, 0),
        (None, 0, 0),
        ([], 0, 0),
    ],
)
def test_parts_of_the_prompt(details: object, cached: int, written: int) -> None:
    usage, _, _ = read(prompt_tokens_details=details)
    assert usage == Usage(**TOKENS, cached_tokens=cached, cache_write_tokens=written)


@pytest.mark.parametrize(
    ("details", "readings"),
    [
        # A part that is larger than the whole is beside it. Nothing is cut down to fit.
        ({"cached_tokens": 101}, [(201, 101, 0)]),
        ({"cached_tokens": 60, "cache_write_tokens": 60}, [(160, 60, 60), (220, 60, 60)]),
    ],
)
def test_part_that_is_larger_than_the_prompt_is_beside_it(
    details: object, readings: list[tuple[int, int, int]]
) -> None:
    report = read_usage({**TOKENS, "prompt_tokens_details": details})
    found = {(usage.prompt_tokens, usage.cached_tokens, usage.cache_write_tokens) for usage in report.readings}
    assert found == set(readings)
    assert report.doubt == "a part of the tokens is larger than the whole"


def test_reasoning_that_is_larger_than_the_completion_is_beside_it() -> None:
    report = read_usage({**TOKENS, "completion_tokens_details": {"reasoning_tokens": 51}})
    assert report.readings == (Usage(prompt_tokens=100, completion_tokens=101, reasoning_tokens=51),)
    assert report.doubt


@pytest.mark.parametrize(("reasoning", "read_as"), [(0, 0), (30, 30), (50, 50), (None, 0), (-1, 0)])
def test_reasoning_is_a_part_of_the_completion(reasoning: object, read_as: int) -> None:
    usage, _, _ = read(completion_tokens_details={"reasoning_tokens": reasoning})
    assert usage == Usage(**TOKENS, reasoning_tokens=read_as)


@pytest.mark.parametrize(
    ("fields", "cost", "is_doubted"),
    [
        # Without a flag, what the provider bills is above the cost only where the key is one's own.
        ({"cost": Decimal("0.95"), "cost_details": {"upstream_inference_cost": 19}}, 19_950_000_000, False),
        ({"cost": 0, "cost_details": {"upstream_inference_cost": 2}}, 2_000_000_000, False),
        ({"cost": 2, "cost_details": {"upstream_inference_cost": 2}}, 2_000_000_000, False),
        ({"cost": 2, "cost_details": {"upstream_inference_cost": 1}}, 2_000_000_000, False),
        # The last digits of a float are no bill of their own.
        (
            {"cost": Decimal("0.3"), "cost_details": {"upstream_inference_cost": Decimal("0.30000000000000004")}},
            300_000_000,
            False,
        ),
        (
            {
                "cost": 1,
                "cost_details": {"upstream_inference_prompt_cost": 1, "upstream_inference_completions_cost": 2},
            },
            4_000_000_000,
            False,
        ),
        ({"cost": None, "cost_details": {"upstream_inference_cost": 2}}, 2_000_000_000, True),
        ({"cost": 1, "cost_details": {"upstream_inference_cost": "free"}}, 1_000_000_000, True),
        ({"is_byok": True, "cost": None, "cost_details": {"upstream_inference_cost": 2}}, 2_000_000_000, True),
        # Other providers' forms of a cost.
        ({"cost_in_usd_ticks": 37_756_000}, 3_775_600, False),
        ({"cost_in_usd_ticks": 1}, 1, False),
        ({"cost_in_usd_ticks": -1}, None, True),
        ({"cost_in_usd_ticks": True}, None, True),
        ({"cost": {"total_cost": Decimal("0.5"), "request_cost": 1}}, 500_000_000, False),
        ({"cost": {"request_cost": 1}}, None, True),
        ({"cost": {"total": "0.5"}}, 500_000_000, False),
        ({"cost": " $0.5 "}, 500_000_000, False),
        ({"cost": "5e-1 USD"}, 500_000_000, False),
        ({"cost": "1_0"}, None, True),
        ({"cost": "-0.5"}, None, True),
        ({"total_cost": Decimal("0.5")}, 500_000_000, False),
        ({"estimated_cost": Decimal("0.5")}, 500_000_000, False),
        # A zero under a further name may stand for a price that is not known.
        ({"estimated_cost": 0}, None, False),
        ({"estimated_cost": "?"}, None, False),
        ({"cost": 0, "estimated_cost": 0}, 0, False),
        # Two costs that differ: the higher one.
        ({"cost": 1, "total_cost": 2}, 2_000_000_000, True),
        ({"cost": Decimal("0.01"), "cost_in_usd_ticks": 200_000_000}, 20_000_000, True),
        ({"cost": Decimal("0.02"), "cost_in_usd_ticks": 200_000_000}, 20_000_000, False),
        # With one's own provider key, `cost` is OpenRouter's fee and the provider bills the rest.
        ({"is_byok": True, "cost": 1, "cost_details": {"upstream_inference_cost": 2}}, 3_000_000_000, False),
        ({"is_byok": True, "cost": 0, "cost_details": {"upstream_inference_cost": 2}}, 2_000_000_000, False),
        ({"is_byok": True, "cost": 1, "cost_details": {"upstream_inference_cost": None}}, None, True),
        ({"is_byok": True, "cost": 1, "cost_details": {}}, None, True),
        ({"is_byok": True, "cost": 1}, None, True),
        ({"is_byok": True, "cost": 1, "cost_details": "free"}, None, True),
        ({"is_byok": True, "cost": 1_000_000, "cost_details": {"upstream_inference_cost": 1}}, None, True),
        ({"is_byok": False, "cost": 1, "cost_details": {"upstream_inference_cost": 2}}, 1_000_000_000, False),
        ({"is_byok": "yes", "cost": 1}, 1_000_000_000, False),
        ({"is_byok": "true", "cost": 1}, None, True),
        ({"is_byok": 1, "cost": 2, "cost_details": {"upstream_inference_cost": 1}}, 3_000_000_000, False),
        ({"is_byok": "False", "cost": 1, "cost_details": {"upstream_inference_cost": 2}}, 1_000_000_000, False),
        # The provider's own charge is the sum of its parts, where that is more.
        (
            {
                "is_byok": True,
                "cost": 1,
                "cost_details": {
                    "upstream_inference_cost": 0,
                    "upstream_inference_prompt_cost": 1,
                    "upstream_inference_completions_cost": 2,
                },
            },
            4_000_000_000,
            True,
        ),
    ],
)
def test_cost_under_ones_own_provider_key(fields: dict[str, Any], cost: int | None, *, is_doubted: bool) -> None:
    assert read(**fields)[1:] == (cost, is_doubted)


def test_cost_keeps_every_digit_of_the_reply() -> None:
    # A float would have made 0.1 + 2e-17 of it; and 0.30000000000000004 of 0.3.
    document = read_json(b'{"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.1234567891}')
    assert read_usage(document).cost_nanousd == 123_456_790


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.decimals() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["prompt_tokens", "completion_tokens", "cost", "is_byok", "prompt_tokens_details", "cost_details"]


@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_no_reply_breaks_the_reading(reported: dict[str, Any]) -> None:
    report = read_usage(reported)
    assert report.cost_nanousd is None or 0 <= report.cost_nanousd <= MAX_NANOUSD
    if report.usage is not None:
        # What was built without validation is valid.
        assert Usage.model_validate(report.usage.model_dump()) == report.usage
        assert report.usage.cached_tokens + report.usage.cache_write_tokens <= report.usage.prompt_tokens
        assert report.usage.cache_write_1h_tokens <= report.usage.cache_write_tokens
        assert report.usage.reasoning_tokens <= report.usage.completion_tokens


@given(st.decimals(min_value=0, max_value=1_000_000, places=12))
def test_cost_is_never_read_too_low(usd: Decimal) -> None:
    cost = read_cost(usd)
    assert cost == nanousd_from_usd(usd)
    assert cost is not None
    assert 0 <= Decimal(cost) - usd * 1_000_000_000 < 1
