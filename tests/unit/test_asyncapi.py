"""The published description of the streams says what is sent. That it is current is tested with the other documents."""

from typing import Any

import pytest
import yaml

from docs.generate import asyncapi
from tollbook.schemas.policy import default_policy
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import Task


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return yaml.safe_load(asyncapi.DOCUMENT.read_text(encoding="utf-8"))


def test_every_task_stream_is_a_channel_beside_the_reply(described: dict[str, Any]) -> None:
    assert described["asyncapi"] == "3.0.0"
    assert set(described["channels"]) == set(default_policy().streams) | {"reply_to"}


@pytest.mark.parametrize("stream", list(default_policy().streams))
def test_a_task_stream_carries_tasks(described: dict[str, Any], stream: str) -> None:
    message = described["components"]["messages"][f"{stream}:SubscribeMessage"]
    assert message["payload"] == {"$ref": "#/components/schemas/Task"}


@pytest.mark.parametrize("model", [Task, InferenceResult])
def test_every_field_is_described(described: dict[str, Any], model: type[Task] | type[InferenceResult]) -> None:
    fields = described["components"]["schemas"][model.__name__]["properties"]
    assert set(fields) == set(model.model_fields)
    assert all(field["description"] for field in fields.values())


def test_money_is_described_as_the_string_that_is_written(described: dict[str, Any]) -> None:
    cost = described["components"]["schemas"]["InferenceResult"]["properties"]["cost_usd"]
    written = InferenceResult.model_validate({"task_id": "t", "status": "done"}).model_dump(mode="json")["cost_usd"]
    assert (cost["type"], cost["default"]) == ("string", written)
