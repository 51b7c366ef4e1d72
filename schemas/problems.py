"""Problems of an input as plain sentences: what is wrong, with what value, and what to do.

The only place that turns pydantic's errors into text, and the only one that suggests names. A value is shown unless
its field is declared with `repr=False`: such a field holds a prompt or a secret (G10).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tollbook.schemas.expectations import alternatives_of, choices_of, expectation, is_a, is_model

MAX_PROBLEMS: Final = 5
_MAX_SHOWN_CHARACTERS: Final = 100
_MIN_LIKENESS: Final = 0.6
Location = tuple[int | str, ...]
"""A location in an input: names of fields and indices of lists."""
UTF8_WORDS: Final = "text that UTF-8 can encode (this has half of a surrogate pair)"
_NOT_ALPHANUMERIC: Final = re.compile(r"[^a-z0-9]")


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in an input: its path as people write it, its type, and whether its value may be shown."""

    path: str
    annotation: Any
    marks: tuple[Any, ...] = ()
    is_private: bool = False


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None if none is similar.

    Case, hyphens and underscores are ignored: `User-ID` is `user_id`.
    """
    if len(name) > _MAX_SHOWN_CHARACTERS:
        return None
    by_letters = {_letters(each): each for each in known}
    matches = get_close_matches(_letters(name), by_letters, n=1, cutoff=_MIN_LIKENESS)
    return str(by_letters[matches[0]]) if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'top_p'?` if a known name is similar to `name`, else an empty text."""
    closest = closest_name(name, known)
    return f"; did you mean {closest!r}?" if closest else ""


def unknown_name(kind: str, name: str, known: Collection[str]) -> str:
    """Return the sentence for an unknown name, for example of a plan: with the closest name, and all known names."""
    suggestion = did_you_mean(name, known)
    return f"unknown {kind} {shown_name(name)}{suggestion}{' Known:' if suggestion else '; known:'} {', '.join(known)}"


def problems_of(
    error: ValidationError,
    model: Any,
    *,
    root: str = "",
    subject: Callable[[str], str] = lambda path: f"'{path}' ",
    limit: int = MAX_PROBLEMS,
    hides: Callable[[object], bool] = lambda value: False,  # noqa: ARG005 - by default, nothing is hidden.
) -> list[str]:
    """Return a sentence for each problem of an input that `model`, a pydantic model or a union of them, refuses.

    `root` is the path of the input in what the user wrote; `subject` begins a sentence about a path. The ValueError of
    a validator says what is wrong with its field ("must have no spaces"); for the whole model, it is a whole sentence.
    Values and names for which `hides` is true are not shown (G10).
    """
    found = located_problems(error, model, root=root, subject=subject, limit=limit, hides=hides)
    return list(dict.fromkeys(sentence for _, sentence in found))


def located_problems(
    error: ValidationError,
    model: Any,
    *,
    root: str = "",
    subject: Callable[[str], str] = lambda path: f"'{path}' ",
    limit: int = MAX_PROBLEMS,
    hides: Callable[[object], bool] = lambda value: False,  # noqa: ARG005 - by default, nothing is hidden.
) -> list[tuple[Location, str]]:
    """Return the sentences of `problems_of`, each with its location; empty for a problem of the whole input."""
    details = error.errors(include_url=False)
    found: list[tuple[Location, str]] = []
    unknown: tuple[Location, _Place] | None = None
    for each in details[:limit]:
        place, parent = _places(each["loc"], _Place(root, model))
        if each["loc"][-1:] == ("[key]",):
            found.append((each["loc"][:-1], _sentence_of_name(each, _places(each["loc"][:-2], _Place(root, model))[0])))
            continue
        shown_place = replace(place, is_private=True) if hides(each["input"]) else place
        found.append((each["loc"], _sentence(each, shown_place, parent, subject, hides)))
        if each["type"] == "extra_forbidden" and closest_name(str(each["loc"][-1]), _fields(parent)) is None:
            unknown = unknown or (each["loc"], parent)
    if unknown is not None:
        found.append((unknown[0], f"known fields: {', '.join(_fields(unknown[1]))}"))
    if len(details) > limit:
        found.append(((), f"{len(details) - limit} more problems"))
    return found


def as_text(sentences: Iterable[str]) -> str:
    """Return sentences as one line."""
    text = ""
    for sentence in sentences:
        text += f"{'' if not text else ' ' if text.endswith('?') else '; '}{sentence}"
    return text


def shown(value: object) -> str:
    """Return a value for a message, control characters escaped; for a long value, list or object, only its kind."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return repr(str(value)) if len(value) <= _MAX_SHOWN_CHARACTERS else f"a text of {len(value)} characters"
        case int():
            return str(value) if value.bit_length() <= 3 * _MAX_SHOWN_CHARACTERS else "a number of over 90 digits"
        case float() | Decimal():
            text = str(value)
            return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"a number of {len(text)} characters"
        case _:
            return _kind(value)


def shown_name(name: str) -> str:
    """Return a name for a message; for a long name, its length."""
    return repr(name) if len(name) <= _MAX_SHOWN_CHARACTERS else f"of {len(name)} characters"


def _letters(name: str) -> str:
    return _NOT_ALPHANUMERIC.sub("", name.lower())


def _places(location: Location, whole: _Place) -> tuple[_Place, _Place]:
    """Return the place at a location, and the place that contains it."""
    place = parent = whole
    for part in location:
        place, parent = _step(place, part), place
    return place, parent


def _sentence(
    error: ErrorDetails,
    place: _Place,
    parent: _Place,
    subject: Callable[[str], str],
    hides: Callable[[object], bool],
) -> str:
    about = subject(place.path) if place.path else ""
    cause = error.get("ctx", {}).get("error")
    match error["type"]:
        case "missing":
            return f"{about}is missing"
        case "extra_forbidden":
            name = str(error["loc"][-1])
            where = f" in '{parent.path}'" if parent.path else ""
            which = f"of {len(name)} characters" if hides(name) else shown_name(name)
            return f"unknown field {which}{where}{did_you_mean(name, _fields(parent))}"
        case "value_error" if type(cause) is ValueError:
            # A validator of the whole model names the field itself.
            return f"{about}{cause}" if error["loc"] or not about else f"'{place.path}': {cause}"
        case "string_unicode":
            return f"{about or 'the name of a field '}must be {UTF8_WORDS}"
        case "union_tag_invalid":
            tag = error.get("ctx", {}).get("tag")
            known = error.get("ctx", {}).get("expected_tags")
            which = "an unknown type" if hides(tag) else f"the unknown type {shown(tag)}"
            return f"{about}has {which}; known: {known}"
        case "union_tag_not_found":
            return f"{about}has no type"
        case "json_invalid":
            return f"{about or 'the text '}is not JSON"
        case _:
            expected = expectation(place.annotation, place.marks)
            return f"{about or 'the input '}must be {expected}{_found(place, error['input'])}"


def _sentence_of_name(error: ErrorDetails, table: _Place) -> str:
    """Return the sentence for a wrong name in a table whose names the user chooses."""
    kinds = [kind for kind in alternatives_of(table.annotation)[0] if is_a(kind, Mapping)]
    names = get_args(kinds[0])[:1] if kinds else ()
    cause = error.get("ctx", {}).get("error")
    problem = str(cause) if type(cause) is ValueError else f"must be {expectation(names[0] if names else str)}"
    return f"the name {shown(error['input'])} in '{table.path}' {problem}"


def _fields(place: _Place) -> list[str]:
    models = [kind for kind in alternatives_of(place.annotation)[0] if is_model(kind)]
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _found(place: _Place, value: object) -> str:
    if place.is_private and isinstance(value, str | int | float):
        return "" if isinstance(value, str) else f", not {_kind(value)}"
    choices = choices_of(place.annotation)
    suggestion = did_you_mean(value, choices) if isinstance(value, str) and choices else ""
    return f", not {shown(value)}{suggestion}"


def _step(place: _Place, part: str | int) -> _Place:
    """Return the place one step further along an error's location."""
    kinds = [kind for kind in alternatives_of(place.annotation)[0] if kind is not type(None)]
    if isinstance(part, int):
        path = f"{place.path}[{part}]"
    else:
        # In a table, the user chose the name.
        is_plain = part.isprintable() and len(part) <= _MAX_SHOWN_CHARACTERS
        path = f"{place.path}.{part if is_plain else shown_name(part)}".removeprefix(".")
    models = [kind for kind in kinds if is_model(kind)]
    if len(models) > 1:
        # Here pydantic's location has the tag of one of the models, which is not part of the user's path.
        for kind in models:
            if any(part in get_args(each.annotation) for each in kind.model_fields.values()):
                return _Place(place.path, kind, is_private=place.is_private)
    for kind in kinds:
        if is_model(kind):
            if (field := _field(kind, part)) is not None:
                return _Place(path, field.annotation, tuple(field.metadata), is_private=not field.repr)  # G10
        elif is_a(kind, Sequence if isinstance(part, int) else Mapping):
            items = get_args(kind)
            return _Place(path, items[isinstance(part, str)] if items else Any, is_private=place.is_private)
    return place if len(kinds) > 1 else _Place(path, Any, is_private=True)


def _field(model: type[BaseModel], part: str | int) -> FieldInfo | None:
    fields = model.model_fields
    by_alias = (field for field in fields.values() if part in (field.alias, field.validation_alias))
    return fields.get(str(part)) or next(by_alias, None)


def _kind(value: object) -> str:
    match value:
        case bool():
            return "true or false"
        case int() | float() | Decimal():
            return "a number"
        case str():
            return "text"
        case bytes():
            return "bytes"
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case _:
            return f"a value of type {type(value).__name__}"
