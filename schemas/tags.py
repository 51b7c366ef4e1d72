"""Tags of a task: names and values that its publisher chooses, by which budgets and reports group calls."""

import re
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Annotated, Final, cast

from pydantic import BeforeValidator

from tollbook.schemas.identifiers import check_id, id_text
from tollbook.schemas.problems import shown

MAX_TAGS: Final = 16
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
# A budget may be kept by these attributes too.
_RESERVED_NAMES: Final = frozenset({"user", "plan", "campaign", "task", "model"})


def read_tags(words: Iterable[str]) -> dict[str, str]:
    """Read tags that people write as `NAME=VALUE`. Errors: ValueError, with the word to correct."""
    tags: dict[str, str] = {}
    for word in words:
        name, equals, value = (each.strip() for each in word.partition("="))
        if not equals:
            raise ValueError(f"{word!r:.80} is not written NAME=VALUE")
        if tags.setdefault(name, value) != value:
            raise ValueError(f"{name:.80} is given twice")
    return tags


def _tags(value: object) -> object:
    """Return tags with every value as text; nulls count as absent. Errors: ValueError."""
    if not isinstance(value, Mapping):
        return value
    given = {name: each for name, each in cast("Mapping[str, object]", value).items() if each is not None}
    if len(given) > MAX_TAGS:
        raise ValueError(f"must have at most {MAX_TAGS} tags, not {len(given)}")
    return {_tag_name(name): _tag_value(name, each) for name, each in given.items()}


def _tag_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("must have names of 1 to 64 letters, digits and any of _ . -, which begin with a letter or _")
    if name in _RESERVED_NAMES:
        raise ValueError(f"must not be named {name!r}: every call has this attribute already")
    return name


def _tag_value(name: str, value: object) -> str:
    read = id_text(value)
    if isinstance(read, float) and isfinite(read):  # NaN often stands for a missing value in a table.
        read = _float_text(read)
    if not isinstance(read, str):
        raise ValueError(f"must have a text or a number under {name!r}, not {shown(value)}")  # noqa: TRY004 - pydantic turns only ValueErrors into problems.
    try:
        return check_id(read)
    except ValueError as exc:
        raise ValueError(f"has a value under {name!r} that {exc}") from None


def _float_text(number: float) -> str:
    """Return the shortest text that is exactly this number; a whole number has the text of an integer."""
    short = f"{number:g}"
    if float(short) == number:
        return short
    return str(int(number)) if number.is_integer() else repr(number)


Tags = Annotated[dict[str, str], BeforeValidator(_tags)]
"""Values by name. Values have the form of ids, since they are part of budgets' keys."""
