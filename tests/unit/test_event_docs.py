"""The description of the events is the one the code would give today, and says what stored events look like."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import pytest
from jsonschema import Draft202012Validator

from docs.generate import event_docs
from tests.unit.test_golden_events import SINCE
from tollbook.schemas.events import ENVELOPE_FIELDS, EVENT_VERSION

FILES: Final = sorted(event_docs.GOLDEN.glob("v*/*.json"))
Document = dict[str, Any]


def read(path: Path) -> Document:
    return json.loads(path.read_text(encoding="utf-8"))


def validators(version: str, kind: str) -> tuple[Draft202012Validator, Draft202012Validator]:
    """What the committed schemas say of an entry's fields and of its payload."""
    schemas = (read(event_docs.SCHEMAS / name) for name in ("envelope.json", f"{version}/{kind}.json"))
    envelope, payload = (Draft202012Validator(schema) for schema in schemas)
    return envelope, payload


def stored(path: Path) -> tuple[Document, Document, Draft202012Validator, Draft202012Validator]:
    fields = read(path)["fields"]
    return fields, json.loads(fields["payload"]), *validators(path.parent.name, fields["type"])


def test_every_type_has_a_schema_of_every_version_and_no_schema_is_left_over() -> None:
    found = {path.relative_to(event_docs.SCHEMAS).as_posix() for path in event_docs.SCHEMAS.rglob("*.json")}
    versions = range(1, EVENT_VERSION + 1)
    assert found == {"envelope.json"} | {
        f"v{v}/{kind}.json" for v in versions for kind in event_docs.PAYLOADS if v >= SINCE.get(kind, 1)
    }
    for name in found:
        Draft202012Validator.check_schema(read(event_docs.SCHEMAS / name))


def test_the_envelope_has_the_fields_of_an_entry_in_their_order() -> None:
    assert list(event_docs.envelope_schema()["properties"]) == list(ENVELOPE_FIELDS)


@pytest.mark.parametrize("kind", event_docs.PAYLOADS)
def test_every_field_of_an_event_has_its_meaning_and_amounts_their_unit(kind: str) -> None:
    schema = event_docs.payload_schema(kind)
    assert schema["description"].endswith(".")
    for part in (schema, *schema.get("$defs", {}).values()):
        for name, rule in part["properties"].items():
            assert rule.get("description", "").endswith("."), f"{kind}: {name}"
            unit = {"nanousd": "nano-dollars", "ms": "milliseconds", "mtok": "million"}.get(name.rpartition("_")[2], "")
            assert unit in rule["description"], f"{kind}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_stored_event_is_as_its_schemas_say(path: Path) -> None:
    fields, payload, envelope, own = stored(path)
    envelope.validate(fields)
    own.validate(payload)


# --- Changed events


ENVELOPE_CHANGES: Final[dict[str, tuple[Any, ...]]] = {
    "type": ("", "budget-lent", 1),
    "v": ("0", "1.0", "", 1),
    "seq": ("0", "01", "-1", "1e3", 1),
    "user_id": (None, 42),
    "period": ("2026-13", "2026", "2026-11-01", None),
    "call_id": (None,),
    "attempt": ("-1", "1.0", "", 0),
    "amount": ("", "1e3", "0.5", "-0", "+1", "007", 1),
    "committed": ("much", "1.5", None, 0),
    "payload": (None, {}),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_entry_with_a_changed_field_is_not_as_the_schema_says(path: Path) -> None:
    fields, _, envelope, _ = stored(path)
    assert list(ENVELOPE_CHANGES) == list(ENVELOPE_FIELDS)
    for name, values in ENVELOPE_CHANGES.items():
        assert not envelope.is_valid({key: value for key, value in fields.items() if key != name}), name
        for value in values:
            assert not envelope.is_valid({**fields, name: value}), (name, value)
    assert not envelope.is_valid({**fields, "comment": "x"})


def changes(value: Any, schema: Document, root: Document) -> Iterator[tuple[str, Any]]:
    """Every way to put something of another kind into one place of a payload, or to leave out what must be there."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        (schema,) = (choice for choice in schema["anyOf"] if choice.get("type") != "null")
        yield from changes(value, schema, root)
        return
    match value:
        case dict():
            yield "an object becomes text", "x"
            for name in schema.get("required", ()):
                yield f"without {name}", {key: each for key, each in value.items() if key != name}
            # An object without a fixed form has no properties.
            for name, each in value.items() if "properties" in schema else ():
                for change, changed in changes(each, schema["properties"][name], root):
                    yield f"{name}: {change}", {**value, name: changed}
        case list():
            yield "a list becomes an object", {}
            for at, each in enumerate(value):
                for change, changed in changes(each, schema["items"], root):
                    yield f"{at}: {change}", [*value[:at], changed, *value[at + 1 :]]
        case str():
            yield "text becomes a number", 5
            if "enum" in schema:
                yield "another word", value + "x"
        case _:
            yield "a number becomes text", str(value)
            yield "a number gets a fraction", value + 0.5
            for limit, beyond in (("minimum", -1), ("maximum", 1)):
                if limit in schema:
                    yield f"beyond the {limit}", schema[limit] + beyond


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_payload_with_a_changed_field_is_not_as_the_schema_says(path: Path) -> None:
    _, payload, _, own = stored(path)
    schema = cast("Document", own.schema)
    made = list(changes(payload, schema, schema))
    assert len(made) > len(payload)
    for change, changed in made:
        assert not own.is_valid(changed), change


def test_fields_of_a_later_version_are_ignored() -> None:
    _, payload, _, own = stored(event_docs.GOLDEN / "v1" / "budget-reserved.json")
    assert own.is_valid({**payload, "invented": 1})
