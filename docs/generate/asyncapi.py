"""The AsyncAPI 3 document of the task streams and of the reply to a task, made from the real payload models.

Nothing is connected and nothing is consumed: the broker made here exists only to be described.
Needs PyYAML, which only a development environment has.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from faststream.redis import RedisBroker, StreamSub
from faststream.specification import AsyncAPI
from pydantic import BaseModel, Field, Json

from tollbook.ledger.keys import GROUP
from tollbook.schemas.identifiers import TaskId
from tollbook.schemas.policy import default_policy
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import Task

DOCUMENT: Final = Path(__file__).resolve().parents[1] / "reference" / "asyncapi.yaml"

_TASKS: Final = (
    "Redis Stream of tasks. An entry holds the task's fields as plain text, `messages` and `metadata` as JSON; or one "
    "field `data` with the whole task as a JSON object; or FastStream's own envelope. Every task type may be put on "
    "every stream. `user_id` is required for every task type but `ping`; so is exactly one of `prompt` and `messages`."
)
_REPLIES: Final = (
    "Redis Stream named by a task's `reply_to`; the address here is an example. A result is appended at least once, so "
    "readers go by `task_id`. The same JSON stands under the task's result key."
)


class Reply(BaseModel):
    """What is appended to the stream that a task names in `reply_to`."""

    task_id: TaskId
    result: Json[InferenceResult] = Field(description="The result as JSON text.")


def documents() -> dict[Path, str]:
    """Return the document, with its text."""
    return {DOCUMENT: document()}


def document() -> str:
    """Return the document as YAML."""
    broker = RedisBroker("redis://127.0.0.1:6379")
    for stream in default_policy().streams:
        subscriber = broker.subscriber(
            stream=StreamSub(stream, group=GROUP, consumer="one-for-each-worker"),
            title=stream,
            description=_TASKS,
        )
        subscriber(_execute)
    broker.publisher(stream="replies", title="reply_to", description=_REPLIES, schema=Reply)
    specification = AsyncAPI(
        broker,
        title="Tollbook",
        version=version("tollbook"),
        description="Tasks for models, published on Redis Streams, and what came of them.",
        schema_version="3.0.0",
    )
    return _as_yaml(json.loads(specification.to_specification().to_json()))


def _as_yaml(content: dict[str, Any]) -> str:
    import yaml

    # FastStream keeps subscribers in a set; a document that is compared needs one order.
    for part in ("channels", "operations"):
        content[part] = dict(sorted(content[part].items()))
    content["components"] = {part: dict(sorted(found.items())) for part, found in content["components"].items()}
    # Pydantic describes what the model takes; it always writes a string: a JSON number is a float to many.
    properties = content["components"]["schemas"]["InferenceResult"]["properties"]
    properties["cost_usd"] = {
        "description": properties["cost_usd"]["description"],
        "default": "0.000000000",
        "pattern": r"^-?\d+\.\d{9}$",
        "title": "Cost Usd",
        "type": "string",
    }
    return yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)


async def _execute(task: Task) -> None:
    """Run one task under the user's budget."""
