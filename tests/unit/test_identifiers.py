"""Identifiers: what may be one, billing windows, budget names, partitions, entry ids."""

import unicodedata
from datetime import UTC, datetime
from functools import cache

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollbook.ledger.packaged import packaged_text
from tollbook.schemas.identifiers import (
    MAX_ID_CHARACTERS,
    ZERO_ENTRY,
    EntryId,
    budget_name,
    budget_value,
    check_id,
    day_at,
    definition_name,
    describe_budget,
    month_at,
    normalise_id,
    partition_of,
    read_values,
    split_budget_name,
    task_id_from_entry,
)

# From 1970 to the year 9998.
MOMENTS = st.integers(0, 253_370_764_799_000)


def _ms(*date: int) -> int:
    return int(datetime(*date, tzinfo=UTC).timestamp()) * 1000  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    "value",
    [
        "u42",
        "a",
        "a" * MAX_ID_CHARACTERS,
        "user:42/7@host",
        "Jürgen",
        "用户",
        "{x}",
        "%41",
        "\ufb01",
        "\uff41",
        "\u2764",
        "O'Brien",
        "Mary Ann",
    ],
)
def test_an_id_is_any_printable_word(value: str) -> None:
    assert check_id(value) == value


@pytest.mark.parametrize(
    "value",
    [
        "", "a" * (MAX_ID_CHARACTERS + 1), " ", " a", "a ", "a\n", "a\tb", 'a"b', "a\\b", "a\x00", "a\x7f", "a\x85",
        "a\u00a0b", "a\u2028b", "a\u200bb", "a\ud800", "a\ufeff", "a\u200db", "a\u202eb", "a\u00adb",
        # Python calls these printable, but they are invisible.
        "a\u034f", "\u3164", "\uffa0", "a\u115f", "a\ufe0f", "a\U000e0101", "a\u180b", "a\u17b4", "\u2800",
        # Composed, they are what is refused: U+2000 is a space of another name.
        "a\u2000b",
    ],
)  # fmt: skip
def test_an_id_has_no_outer_spaces_double_quotes_or_control_characters(value: str) -> None:
    with pytest.raises(ValueError, match="must have"):
        check_id(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rene\u0301", "ren\u00e9"),
        # Accents in another order, a Korean syllable in parts, the sign for angstrom.
        ("a\u0323\u0301", "a\u0301\u0323"), ("\u1112\u1161\u11ab", "\ud55c"), ("\u212b", "\u00c5"),
    ],
)  # fmt: skip
def test_two_spellings_of_an_id_are_one(one: str, other: str) -> None:
    """G1: they were two users with two caps."""
    assert check_id(one) == check_id(other) == normalise_id(one) == unicodedata.normalize("NFC", other)


@given(st.text(min_size=1, max_size=5))
def test_a_stored_id_is_in_normal_form(value: str) -> None:
    try:
        kept = check_id(value)
    except ValueError:
        return
    assert check_id(kept) == normalise_id(kept) == kept


def test_characters_are_counted_in_the_normal_form() -> None:
    assert check_id("e\u0301" * MAX_ID_CHARACTERS) == "\u00e9" * MAX_ID_CHARACTERS
    # U+0958 is two characters when it is composed.
    with pytest.raises(ValueError, match=f"characters, not {MAX_ID_CHARACTERS + 1}$"):
        check_id("\u0958" + "a" * (MAX_ID_CHARACTERS - 1))


def test_a_long_run_of_accents_is_not_composed() -> None:
    """It would take minutes: the accents are sorted, each against each."""
    with pytest.raises(ValueError, match="characters, not 1000001"):
        check_id("e" + "\u0301\u0323" * 500_000)


def test_ids_that_look_alike_stay_different() -> None:
    """Only what Unicode calls the same text is: compatibility forms and other alphabets are other ids."""
    assert len({check_id(each) for each in ("fi", "\ufb01", "FI", "\uff46\uff49", "f\u0456")}) == 5


@pytest.mark.parametrize(
    ("moment", "name", "start", "end"),
    [
        ((2026, 11, 24, 7), "2026-11", (2026, 11, 1), (2026, 12, 1)),
        ((2026, 12, 31, 23, 59, 59), "2026-12", (2026, 12, 1), (2027, 1, 1)),
        ((2027, 1, 1), "2027-01", (2027, 1, 1), (2027, 2, 1)),
        ((2028, 2, 29), "2028-02", (2028, 2, 1), (2028, 3, 1)),
    ],
)
def test_a_billing_period_is_a_calendar_month_in_utc(
    moment: tuple[int, ...], name: str, start: tuple[int, ...], end: tuple[int, ...]
) -> None:
    month = month_at(_ms(*moment))
    assert (month.name, month.start_ms, month.end_ms) == (name, _ms(*start), _ms(*end))


@given(MOMENTS)
def test_windows_contain_their_moment_and_leave_no_gap(now_ms: int) -> None:
    for window_at in (month_at, day_at):
        window = window_at(now_ms)
        assert window.start_ms <= now_ms < window.end_ms
        assert window_at(window.start_ms) == window == window_at(window.end_ms - 1)
        assert window_at(window.end_ms).start_ms == window.end_ms


def test_a_day_is_named_by_its_date() -> None:
    assert day_at(_ms(2026, 11, 5, 12)).name == "2026-11-05"
    assert day_at(_ms(2026, 11, 5)).end_ms - day_at(_ms(2026, 11, 5)).start_ms == 24 * 3_600_000


@given(
    st.sampled_from(["user", "day", "team-week~3"]),
    st.text(min_size=1),
    st.sampled_from(["2026-11", "2026-W48", "total"]),
)
def test_a_budgets_name_can_be_taken_apart_whatever_its_subject(kind: str, subject: str, window: str) -> None:
    assert split_budget_name(budget_name(kind, subject, window)) == (kind, subject, window)


def test_a_budgets_name_is_a_contract() -> None:
    """It stands in Redis keys, in events and in DuckDB."""
    assert budget_name("user", "u42", "2026-11") == "user:u42:2026-11"


def test_values_of_several_attributes_are_one_value() -> None:
    assert budget_value([]) == "all"
    assert budget_value(["50%,5"]) == "50%,5"
    assert budget_value(["red", "a,b", "5%"]) == "red,a%2Cb,5%25"


@given(st.lists(st.text(), min_size=2, max_size=3), st.lists(st.text(), min_size=2, max_size=3))
def test_other_values_are_another_value(one: list[str], other: list[str]) -> None:
    """G1: two balances joined into one would refuse calls; one split into two could be spent twice."""
    assert (budget_value(one) == budget_value(other)) == (one == other)


@cache
def with_macros() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute(packaged_text("tollbook.ledger.projection.sql", "macros.sql"))
    return connection


HOSTILE = st.text(alphabet="%,:2C5ab\u00e9", min_size=1, max_size=8)


@given(st.lists(HOSTILE, max_size=3))
def test_values_are_read_as_they_were_joined_and_sql_joins_them_alike(values: list[str]) -> None:
    joined = budget_value(values)
    assert read_values(joined, len(values)) == values
    assert with_macros().execute("SELECT budget_value(?::VARCHAR[])", [values]).fetchone() == (joined,)


def test_a_percent_sign_may_be_typed_unencoded() -> None:
    assert budget_value(read_values("50%,red", 2)) == "50%25,red"
    assert read_values("50%,red", 1) == ["50%,red"]
    for value, attributes in (("red", 2), ("a,b,c", 2), ("red", 0)):
        with pytest.raises(ValueError, match="must"):
            read_values(value, attributes)


def test_a_budget_that_was_redefined_has_another_name() -> None:
    assert definition_name("team-week", 0) == definition_name("team-week", 1) == "team-week"
    assert definition_name("team-week", 3) == "team-week~3"


def test_the_budget_of_everybody_is_described_without_a_value() -> None:
    assert describe_budget("all-spend:all:2026-11-24") == "budget all-spend, day 2026-11-24"


def test_a_task_without_an_id_is_named_by_its_entry() -> None:
    assert task_id_from_entry("generation", "1795504509378-0") == "generation-1795504509378-0"
    assert check_id(task_id_from_entry("generation", "1795504509378-0"))


def test_a_users_partition_is_the_crc_32_of_the_id() -> None:
    """The check value of the CRC-32 standard; another function would split a user's spend."""
    assert partition_of("123456789", 2**32) == 0xCBF43926
    assert [partition_of(user_id, 1) for user_id in ("u1", "Jürgen")] == [0, 0]


@given(st.text(min_size=1), st.integers(1, 64))
def test_every_user_has_a_partition(user_id: str, partitions: int) -> None:
    try:
        user_id.encode()
    except UnicodeEncodeError:
        return  # Such a text is no id.
    assert 0 <= partition_of(user_id, partitions) < partitions


@given(st.tuples(st.integers(0, 2**47), st.integers(0, 2**32)), st.tuples(st.integers(0, 2**47), st.integers(0, 2**32)))
def test_entry_ids_are_ordered_by_time_then_sequence(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (EntryId(*one) < EntryId(*other)) == (one < other)
    assert EntryId.parse(str(EntryId(*one))) == EntryId(*one)


def test_an_entry_id_without_sequence_is_the_first_of_its_millisecond() -> None:
    assert EntryId.parse("5") == EntryId(5, 0)
    assert EntryId.parse("0-0") == ZERO_ENTRY < EntryId(0, 1)


@pytest.mark.parametrize("text", ["", "-", "-5", "x-1", "1-x", "1-2-3", "$", ">"])
def test_a_malformed_entry_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        EntryId.parse(text)


@pytest.mark.parametrize(
    ("kind", "window", "described"),
    [
        ("user", "2026-11", "user team:7, period 2026-11"),
        ("day", "2026-11-24", "user team:7, day 2026-11-24"),
        ("campaign", "2026-11", "campaign team:7, period 2026-11"),
        ("team-week", "2026-W48", "budget team-week of team:7, week 2026-W48"),
        ("team-week~3", "2026-W48", "budget team-week (as defined by policy version 3) of team:7, week 2026-W48"),
        ("prepaid", "total", "budget prepaid of team:7, in total"),
    ],
)
def test_a_budget_is_described_by_whom_it_is_for(kind: str, window: str, described: str) -> None:
    assert describe_budget(budget_name(kind, "team:7", window)) == described
