"""The published description of the streams is the one the code would give today."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate import asyncapi
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import Task, TaskStream


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return yaml.safe_load(asyncapi.DOCUMENT.read_text(encoding="utf-8"))


def test_the_committed_document_is_current() -> None:
    assert asyncapi.DOCUMENT.read_text(encoding="utf-8") == asyncapi.document(), "run python -m docs.generate.asyncapi"


def test_check_tells_a_current_document_from_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncapi.main(["--check"]) == 0
    monkeypatch.setattr(asyncapi, "DOCUMENT", tmp_path / "asyncapi.yaml")
    assert asyncapi.main(["--check"]) == 1
    assert asyncapi.main([]) == 0
    assert asyncapi.main(["--check"]) == 0


def test_every_task_stream_is_a_channel_beside_the_reply(described: dict[str, Any]) -> None:
    assert described["asyncapi"] == "3.0.0"
    assert set(described["channels"]) == {stream.value for stream in TaskStream} | {"reply_to"}


@pytest.mark.parametrize("stream", list(TaskStream))
def test_a_task_stream_carries_tasks(described: dict[str, Any], stream: TaskStream) -> None:
    message = described["components"]["messages"][f"{stream.value}:SubscribeMessage"]
    assert message["payload"] == {"$ref": "#/components/schemas/Task"}


@pytest.mark.parametrize("model", [Task, InferenceResult])
def test_every_field_is_described(described: dict[str, Any], model: type[Task] | type[InferenceResult]) -> None:
    assert set(described["components"]["schemas"][model.__name__]["properties"]) == set(model.model_fields)


def test_money_is_described_as_the_string_that_is_written(described: dict[str, Any]) -> None:
    cost = described["components"]["schemas"]["InferenceResult"]["properties"]["cost_usd"]
    written = InferenceResult.model_validate({"task_id": "t", "status": "done"}).model_dump(mode="json")["cost_usd"]
    assert (cost["type"], cost["default"]) == ("string", written)
