"""Structured output: the schema that is asked for, and the answer as an instance."""

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from tollbook import InferenceResult, OutputInvalid, TaskStatus
from tollbook.inference.structured_output import parse_output, response_format_of
from tollbook.schemas.tasks import task_from_fields


class Line(BaseModel):
    text: str = Field(description="One line.")
    syllables: int = 5


class Haiku(BaseModel):
    lines: list[Line]
    mood: Literal["glad", "sad"] | None = None
    best: Line | None = None


class Free(BaseModel):
    scores: dict[str, float]


def answered(content: str | None) -> InferenceResult:
    return InferenceResult(task_id="t", status=TaskStatus.DONE, content=content, cost_usd="0.5")  # pyright: ignore[reportArgumentType]


def objects(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for each in schema for found in objects(each)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" else []
    return own + [found for each in schema.values() for found in objects(each)]


def test_a_schema_is_strict_where_it_can_be() -> None:
    form = response_format_of(Haiku)["json_schema"]
    assert (form["name"], form["strict"]) == ("Haiku", True)
    found = objects(form["schema"])
    assert len(found) == 2
    for each in found:
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])
    assert "default" not in str(form)


def test_a_schema_with_fields_of_any_name_is_not_strict() -> None:
    form = response_format_of(Free)["json_schema"]
    assert form["strict"] is False
    assert form["schema"] == Free.model_json_schema()


@pytest.mark.parametrize("model", [Haiku, Free])
def test_a_schema_is_a_response_format_of_a_task(model: type[BaseModel]) -> None:
    form = response_format_of(model)
    task = task_from_fields({"task": "score_post", "user_id": "u", "prompt": "x", "response_format": form})
    assert task.parameters() == {"response_format": form}


@pytest.mark.parametrize("content", ['{"text": "a"}', '```json\n{"text": "a"}\n```', '\n```\n{"text": "a"}\n```\n'])
def test_an_answer_becomes_an_instance(content: str) -> None:
    assert parse_output(answered(content), Line) == Line(text="a")


@pytest.mark.parametrize(
    "content", [None, "", "I cannot help with my secret.", '{"text": ["my secret"]}', '{"my secret": 1}']
)
def test_an_answer_of_another_form_is_an_error_with_what_it_cost(content: str | None) -> None:
    with pytest.raises(OutputInvalid) as refused:
        parse_output(answered(content), Line)
    assert refused.value.code == "OUTPUT_INVALID"
    assert (refused.value.result.content, str(refused.value.result.cost_usd)) == (content, "0.5")
    assert "secret" not in str(refused.value)
