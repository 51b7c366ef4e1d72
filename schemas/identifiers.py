"""Identifiers: users, tasks, billing periods, budgets, partitions, stream entries.

A call's id is its task's id, so that a redelivered task is the same call.
"""

import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, NamedTuple

from pydantic import AfterValidator, BeforeValidator, StringConstraints

from tollbook.schemas.expectations import Expected

MAX_ID_CHARACTERS: Final = 200
# Composing makes one character of at most four (Unicode 14 and 15, for example U+1F82). Longer text is not composed:
# for a long run of accents, Python takes quadratic time.
_MAX_UNCOMPOSED: Final = 4 * MAX_ID_CHARACTERS
# Ids are parts of Redis keys, budget names, log lines and shell commands.
_FORBIDDEN = re.compile(r"[^\S ]|[\"\\\x00-\x1f\x7f-\x9f]")
# Invisible, but printable to Python: Unicode's Default_Ignorable_Code_Point, and the empty Braille cell.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)


def check_id(value: str) -> str:
    """Return an id in the one spelling (Unicode NFC) in which it is kept, compared and hashed.

    It has 1 to 200 printable and visible characters, counted in that spelling, without double quotes or backslashes.
    It does not begin or end with a space.
    Compatibility forms stay different: a ligature, a full-width letter or a Cyrillic letter is not the Latin one.
    Errors: ValueError, whose text says what the id must be; the caller puts the name of the field before it.
    """
    id_ = normalise_id(value)
    if not 1 <= len(id_) <= MAX_ID_CHARACTERS:
        raise ValueError(f"must have 1 to {MAX_ID_CHARACTERS} characters, not {len(id_)}")
    if _FORBIDDEN.search(id_) or not id_.isprintable():
        raise ValueError("must have no double quotes, backslashes, line breaks or control characters")
    if id_ != id_.strip(" "):
        raise ValueError("must have no space at its beginning or end")
    if not id_.isascii() and _INVISIBLE.search(id_):
        raise ValueError("must have no invisible characters")
    return id_


def normalise_id(value: str) -> str:
    """Return the stored spelling of an id (Unicode NFC), to look it up; text too long for an id stays as it is."""
    if value.isascii() or len(value) > _MAX_UNCOMPOSED:
        return value
    return unicodedata.normalize("NFC", value)


def id_text(value: object) -> object:
    """Return a whole number or a UUID as the text of an id, and anything else as it is."""
    is_uuid = type(value).__module__ == "uuid"  # Not imported, since this module must not make ids.
    return str(value) if is_uuid or type(value) is int else value


# First words of ids that do not belong to a task: commands of people, credits of budgets and their expiry, spend that
# an application recorded, and the events of `tollbook recover`.
_COMMAND_WORDS: Final = (
    "plan-assigned", "plan-cleared", "credit-granted", "credit-revoked", "key-created", "key-revoked",
    "credit", "credit-expired", "usage", "unbooked", "recovered",
)  # fmt: skip


def check_task_id(value: str) -> str:
    """Return a task's id, which must not have the form of a command's id. Errors: ValueError."""
    id_ = check_id(value)
    if " " in id_ and id_.split(" ", 1)[0] in _COMMAND_WORDS:  # G4
        raise ValueError(f"must not begin with {id_.split(' ', 1)[0]!r} and a space, as commands' ids do")
    return id_


_HASHED: Final = re.compile(r"(?<![0-9A-Za-z-])h-[0-9a-f]{40}(?![0-9A-Za-z])")
_HASH_BYTES: Final = 20


def hashed_id(digest: bytes) -> str:
    """Return the hashed id of a user from the digest of the plain id: `h-` and 40 hexadecimal digits."""
    return f"h-{digest[:_HASH_BYTES].hex()}"


def is_hashed_id(text: str) -> bool:
    """Whether an id has the form of a hashed id."""
    return _HASHED.fullmatch(text) is not None


def find_hashed_ids(text: str) -> list[str]:
    """Return the hashed ids in a text, such as the value of a budget that is kept by user and team."""
    return _HASHED.findall(text)


def replace_hashed_ids(text: str, plain: Mapping[str, str]) -> str:
    """Return a text in which each hashed id that `plain` has is replaced by its plain id."""
    return _HASHED.sub(lambda found: plain.get(found[0], found[0]), text)


Identifier = Annotated[str, BeforeValidator(id_text), AfterValidator(check_id)]
UserId = Identifier
TaskId = Annotated[str, BeforeValidator(id_text), AfterValidator(check_task_id)]
CampaignId = Identifier

Period = Annotated[str, StringConstraints(pattern=r"^\d{4}-(0[1-9]|1[0-2])$"), Expected("a month such as '2026-11'")]


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time with a name. Bounds are milliseconds since the epoch; the end is excluded."""

    name: str
    start_ms: int
    end_ms: int


def month_at(now_ms: int) -> Window:
    """Return the calendar month in UTC that contains `now_ms`, named `YYYY-MM`."""
    moment = datetime.fromtimestamp(now_ms / 1000, UTC)
    start = datetime(moment.year, moment.month, 1, tzinfo=UTC)
    end = datetime(moment.year + moment.month // 12, moment.month % 12 + 1, 1, tzinfo=UTC)
    return Window(name=f"{start:%Y-%m}", start_ms=_ms(start), end_ms=_ms(end))


def day_at(now_ms: int) -> Window:
    """Return the day in UTC that contains `now_ms`, named `YYYY-MM-DD`."""
    moment = datetime.fromtimestamp(now_ms / 1000, UTC)
    start = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    return Window(name=f"{start:%Y-%m-%d}", start_ms=_ms(start), end_ms=_ms(start + timedelta(days=1)))


def _ms(moment: datetime) -> int:
    return round(moment.timestamp()) * 1000


EVERYBODY: Final = "all"
"""The value of a budget that has one balance for all calls."""
_LABELS: Final = (
    (re.compile(r"\d{4}-\d\d-\d\d"), "day"),
    (re.compile(r"\d{4}-W\d\d"), "week"),
    (re.compile(r"\d{4}-\d\d"), "period"),
)


def budget_name(name: str, value: str, window: str) -> str:
    """Return the key of one balance of a budget, for example `user:u42:2026-11` or `team-week:red:2026-W48`.

    It can be split again: only the value may contain colons, the name and the window do not.
    """
    return f"{name}:{value}:{window}"


def split_budget_name(key: str) -> tuple[str, str, str]:
    """Return (name, value, window) of a budget's key."""
    name, rest = key.split(":", 1)
    value, window = rest.rsplit(":", 1)
    return name, value, window


def budget_value(values: Sequence[str]) -> str:
    """Return the value part of a balance's key: the value of each attribute, or `all` for a budget without attributes.

    Several values are joined by commas; then a comma or percent sign inside a value is percent-encoded.
    """
    if len(values) < 2:
        return values[0] if values else EVERYBODY
    return ",".join(value.replace("%", "%25").replace(",", "%2C") for value in values)


def read_values(value: str, attributes: int) -> list[str]:
    """Split the value part of a key into one value per attribute; `budget_value` joined it, or a person wrote it.

    A percent sign needs no encoding, except before `25` and `2C`. Errors: ValueError.
    """
    if not attributes:
        if value != EVERYBODY:
            raise ValueError(f"must be {EVERYBODY!r}: the budget has one balance for all calls")
        return []
    parts = [value]
    if attributes > 1:
        parts = [part.replace("%2C", ",").replace("%25", "%") for part in value.split(",")]
    if len(parts) != attributes:
        raise ValueError(f"must have {attributes} values separated by commas (write a comma inside a value as %2C)")
    return [normalise_id(part) for part in parts]


def definition_name(name: str, since_version: int) -> str:
    """Return a budget's name in keys: `name~version` if it was redefined, since its balances began at zero then."""
    return name if since_version <= 1 else f"{name}~{since_version}"


def rule_name(name: str) -> str:
    """Return a budget's name in the policy from its name in keys."""
    return name.partition("~")[0]


def describe_budget(key: str) -> str:
    """Describe a budget for people: `user u42, period 2026-11` or `budget team-week of red, week 2026-W48`."""
    name, value, window = split_budget_name(key)
    kind = next((word for pattern, word in _LABELS if pattern.fullmatch(window)), None)
    span = f"{kind} {window}" if kind else "in total"
    if name in ("user", "campaign"):
        return f"{name} {value}, {span}"
    if name == "day":
        return f"user {value}, {span}"
    name, _, version = name.partition("~")
    since = f" (as defined by policy version {version})" if version else ""
    return f"budget {name}{since}{'' if value == EVERYBODY else f' of {value}'}, {span}"


def task_id_from_entry(stream: str, entry_id: str) -> str:
    """Return the id of a task that was published without one. The same entry always gets the same id."""
    return f"{stream}-{entry_id}"


def usage_call_id(key: str) -> str:
    """Return the call id of spend that an application recorded under a key. No task id can begin with `usage `."""
    return f"usage {key}"


def partition_of(user_id: str, partitions: int) -> int:
    """Return the ledger partition of a user: CRC-32 of the UTF-8 bytes, modulo the number of partitions."""
    return zlib.crc32(user_id.encode()) % partitions


class EntryId(NamedTuple):
    """A Redis stream entry id, ordered as Redis orders it: by milliseconds, then by sequence.

    A tuple, for speed: an id is made and compared for every step of every call.
    """

    ms: int
    seq: int

    @classmethod
    def parse(cls, text: str) -> "EntryId":
        """Parse `1732412345678-0`. Errors: ValueError."""
        ms, _, seq = text.partition("-")
        return cls(int(ms), int(seq or 0))

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"


ZERO_ENTRY: Final = EntryId(0, 0)
