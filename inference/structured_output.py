"""Structured output: requesting an answer in the form of a pydantic model, and parsing it into an instance."""

import re
from typing import Any, Final, TypeVar, cast

from pydantic import BaseModel, PydanticUserError, ValidationError

from tollbook.inference.errors import OutputInvalid
from tollbook.schemas.problems import as_text, problems_of, shown
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import InvalidTask

M = TypeVar("M", bound=BaseModel)

# Language models that do not follow a schema strictly put JSON into a block of Markdown.
_FENCED: Final = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9_-]")
_MAX_NAME_CHARACTERS: Final = 64


class ParsedResult(InferenceResult):
    """The result of a call whose answer has the form of a pydantic model."""

    parsed: Any
    """The answer as an instance of the model."""


def response_format_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the `response_format` that requests JSON in the form of a pydantic model.

    It is strict, so that answers always follow the schema, unless the model allows fields of any name.
    Errors: InvalidTask for a model with a field that JSON cannot hold.
    """
    try:
        schema = model.model_json_schema()
    except PydanticUserError as exc:
        raise InvalidTask(f"{model.__name__} has no JSON schema: {exc.message}") from exc
    strict = _closed(schema)
    name = _NOT_IN_A_NAME.sub("_", model.__name__)[:_MAX_NAME_CHARACTERS]
    form = {"name": name, "schema": schema if strict is None else strict, "strict": strict is not None}
    return {"type": "json_schema", "json_schema": form}


def with_response_format(fields: dict[str, Any], response_model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return a task's fields with the schema of a pydantic model, from `response_model` or from `response_format`.

    Errors: InvalidTask.
    """
    model = cast("object", fields.get("response_format") if response_model is None else response_model)
    if response_model is not None or (isinstance(model, type) and issubclass(model, BaseModel)):
        return {**fields, "response_format": response_format_of(checked_model(model))}
    return fields


def checked_model(model: object) -> type[BaseModel]:
    """Return what is a pydantic model. Errors: InvalidTask."""
    if isinstance(model, type) and issubclass(model, BaseModel) and model is not BaseModel:
        return model
    given = shown(cast("object", model))
    raise InvalidTask(f"'response_model' must be a subclass of pydantic.BaseModel, not {given}")


def parse_output(result: InferenceResult, model: type[M]) -> M:
    """Return an answer as an instance of a model.

    Errors: OutputInvalid, with the result, if the model refused to answer or the answer has another form.
    """
    if result.content is None:
        raise OutputInvalid("the model gave no text as an answer", result)
    fenced = _FENCED.fullmatch(result.content)
    try:
        return model.model_validate_json(fenced[1] if fenced else result.content)
    except ValidationError as exc:
        # The text may be logged, so it must not contain values or names from the answer (G10).
        problems = as_text(problems_of(exc, model, hides=lambda value: True))  # noqa: ARG005 - all are hidden.
        raise OutputInvalid(f"the answer is not a valid {model.__name__}: {problems}", result) from None


def _closed(schema: Any) -> Any:
    """Return a schema in OpenAI's strict form, or None if an object in it may have any fields.

    In the strict form (November 2026), all fields are required, no others are allowed, there are no defaults, and there
    is nothing beside a reference.
    """
    if isinstance(schema, list):
        items = [_closed(each) for each in cast("list[Any]", schema)]
        return None if any(item is None for item in items) else items
    if not isinstance(schema, dict):
        return schema
    fields = cast("dict[str, Any]", schema)
    if "$ref" in fields:
        return {"$ref": fields["$ref"]}
    is_object = fields.get("type") == "object"
    if is_object and ("properties" not in fields or fields.get("additionalProperties") not in (None, False)):
        return None
    closed: dict[str, Any] = {}
    for name, value in fields.items():
        match name:
            case "default" | "discriminator":
                continue
            case "properties" | "$defs":
                table = {key: _closed(each) for key, each in value.items()}
                if any(each is None for each in table.values()):
                    return None
                closed[name] = table
            case "items" | "prefixItems" | "anyOf" | "allOf" | "oneOf":
                inner = _closed(value)
                if inner is None:
                    return None
                closed["anyOf" if name == "oneOf" else name] = inner
            case _:
                closed[name] = value
    if is_object:
        closed |= {"additionalProperties": False, "required": list(closed["properties"])}
    return closed
