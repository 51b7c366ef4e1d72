"""The description of every event, made from the payload models: a page, and a JSON Schema for each event.

The examples are the golden files of the tests. Only the current version's schemas are made. Those of an older version
stay as they are: ledgers still hold entries of that version, and the golden files are checked against its schemas.
"""

import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast, get_args

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from docs.generate.markdown import table, with_part
from tollbook.schemas.events import ENVELOPE_FIELDS, EVENT_VERSION, EventPayload, Payload
from tollbook.schemas.upcasters import event_from_entry

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "reference" / "events.md"
SCHEMAS: Final = ROOT / "docs" / "reference" / "schemas"
GOLDEN: Final = ROOT / "tests" / "golden" / "events"

PAYLOADS: Final[dict[str, type[Payload]]] = {
    payload.model_fields["type"].default: payload
    for payload in cast("tuple[type[Payload], ...]", get_args(get_args(EventPayload)[0]))
}
_WHOLE: Final = r"^(0|[1-9][0-9]*)$"
_SIGNED: Final = r"^(0|-?[1-9][0-9]*)$"
_ENVELOPE: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "type": ({"enum": [*PAYLOADS]}, "Type of the event."),
    "v": ({"pattern": r"^[1-9][0-9]*$"}, "Version of the payload's schema."),
    "seq": ({"pattern": r"^[1-9][0-9]*$"}, "Number of the event in its ledger partition: 1, 2, 3 without gaps."),
    "user_id": ({}, "User whose money it concerns; empty where it is nobody's, as for `policy-applied`."),
    "period": (
        {"pattern": r"^([0-9]{4}-(0[1-9]|1[0-2]))?$"},
        "Billing period that is charged, `YYYY-MM` in UTC; empty where no user's money is concerned.",
    ),
    "call_id": ({}, "The call, which is the task's id; or the command that set a plan or granted credit."),
    "attempt": ({"pattern": _WHOLE}, "Attempt of the call, from 1; 0 where there is none."),
    "amount": (
        {"pattern": _SIGNED},
        "Nano-dollars (1e-9 USD) that the event moves; negative in a correction downwards.",
    ),
    "committed": (
        {"pattern": r"^(0|-?[1-9][0-9]*)?$"},
        "The user's settled spend and open holds in the period after the event, nano-dollars; or empty.",
    ),
    "payload": (
        {"contentMediaType": "application/json"},
        "The event's own fields as a JSON object; fields that are absent have their default.",
    ),
}


def documents() -> dict[Path, str]:
    """Return every file that is generated, with its text."""
    found = {SCHEMAS / "envelope.json": _as_json(envelope_schema())}
    for kind in PAYLOADS:
        found[SCHEMAS / f"v{EVENT_VERSION}" / f"{kind}.json"] = _as_json(payload_schema(kind))
    found[PAGE] = with_part(PAGE.read_text(encoding="utf-8"), "events", page())
    return found


def envelope_schema() -> dict[str, Any]:
    """Return the schema of a stream entry's fields, which are all text; the same for every event and version."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": "urn:tollbook:event",
        "title": "event",
        "description": "The fields of an entry of a ledger stream. The entry's id is the event's id and its time.",
        "type": "object",
        "properties": {
            name: {"type": "string", "description": meaning, **rule} for name, (rule, meaning) in _ENVELOPE.items()
        },
        "required": list(ENVELOPE_FIELDS),
        "additionalProperties": False,
    }


def payload_schema(kind: str) -> dict[str, Any]:
    """Return the schema of a type's payload in this version.

    Fields that it does not name are allowed: a reader ignores what a later version adds.
    """
    schema = PAYLOADS[kind].model_json_schema(schema_generator=_Untitled)
    # The type stands in the envelope, not in the payload.
    del schema["properties"]["type"]
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": f"urn:tollbook:event:{kind}:{EVENT_VERSION}"}
    return {**head, "title": kind, "description": _flowing(PAYLOADS[kind]), **_without(schema, "title", "description")}


def page() -> str:
    """Return the generated part of the page: a section for each event, then the objects that they share."""
    schemas = {kind: payload_schema(kind) for kind in PAYLOADS}
    shared = {name: part for schema in schemas.values() for name, part in schema.get("$defs", {}).items()}
    parts = ["## The envelope", table(("field", "form", "meaning"), _envelope_rows())]
    for kind, schema in schemas.items():
        parts += [f"## `{kind}`", _filled(schema["description"]), _fields(schema), _example(kind)]
    for name, part in sorted(shared.items()):
        parts += [f"## {name}", _filled(part["description"]), _fields(part)]
    return "\n\n".join(parts)


class _Untitled(GenerateJsonSchema):
    """Leaves out titles that only repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's signature.
        return False

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().model_schema(schema)
        if "description" in made:
            made["description"] = " ".join(made["description"].split())
        return made


def _envelope_rows() -> Iterator[tuple[str, ...]]:
    forms = {_WHOLE: "whole number", _SIGNED: "whole number, signed"}
    for name, (rule, meaning) in _ENVELOPE.items():
        pattern = rule.get("pattern", "")
        form = "JSON" if name == "payload" else forms.get(pattern, "text")
        form = {"v": "whole number", "seq": "whole number", "committed": "whole number, signed, or empty"}.get(
            name, form
        )
        yield f"`{name}`", form, meaning


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = (
        (f"`{name}`", _form(name, rule), _default(name, rule, required), rule.get("description", ""))
        for name, rule in schema["properties"].items()
    )
    return table(("field", "form", "absent means", "meaning"), rows)


def _form(name: str, rule: Mapping[str, Any]) -> str:
    """Say in words what a value looks like."""
    if "anyOf" in rule:
        return _form(name, next(choice for choice in rule["anyOf"] if choice.get("type") != "null"))
    if "$ref" in rule:
        part = rule["$ref"].rpartition("/")[2]
        return f"[{part}](#{part.lower()})"
    if "enum" in rule:
        return ", ".join(f"`{word}`" for word in rule["enum"])
    match rule["type"]:
        case "array":
            return f"list of {_form(name, rule['items'])}"
        case "object":
            return "JSON object"
        case "integer":
            may_be_negative = name.endswith("_nanousd") and rule.get("minimum") != 0
            return "whole number, signed" if may_be_negative else "whole number"
        case _:
            return "text"


def _default(name: str, rule: Mapping[str, Any], required: Iterable[str]) -> str:
    if name in required:
        return "never absent"
    match rule.get("default"):
        case None:
            return "unknown, or none"
        case [] | {}:
            return "none"
        case value:
            return f"`{value}`"


def _example(kind: str) -> str:
    """Show a stored event of this version: the id, the envelope, and the payload spread out."""
    path = GOLDEN / f"v{EVENT_VERSION}" / f"{kind}.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    event_from_entry(stored["id"], stored["fields"])
    fields = dict(stored["fields"])
    payload = json.dumps(json.loads(fields.pop("payload")), indent=2, ensure_ascii=False)
    envelope = "  ".join(f"{name}={value}" for name, value in fields.items() if value)
    schema = f"Schema: [schemas/v{EVENT_VERSION}/{kind}.json](schemas/v{EVENT_VERSION}/{kind}.json)."
    return f"{schema}\n\n```text\n{stored['id']}  {envelope}\n```\n\n```json\n{payload}\n```"


def _flowing(payload: type[Payload]) -> str:
    return " ".join((inspect.getdoc(payload) or "").split())


def _filled(text: str) -> str:
    return textwrap.fill(text, 128, break_on_hyphens=False, break_long_words=False)


def _without(document: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}


def _as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
