"""`tollbook publish`, `result` and `ping`: put a task on a stream, and read its result."""

import asyncio
import json
import uuid
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tollbook.cli.options import (
    JsonOption,
    complete_plan,
    complete_stream,
    complete_task_type,
    load_redis_alone,
    read_call,
)
from tollbook.schemas.entries import TaskFields
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.tasks import PING, InvalidTask
from tollbook.views.tables import printable

if TYPE_CHECKING:
    from tollbook.inference.publisher import Publisher

NO_RESULT = 4

Wait = Annotated[float | None, typer.Option(min=0, help="Seconds to wait for the result at most.")]


def publish(
    stream: Annotated[
        str, typer.Argument(help="The task stream; one of the policy's.", autocompletion=complete_stream)
    ],
    task: Annotated[
        str, typer.Argument(help="The task type; one of the policy's, or ping.", autocompletion=complete_task_type)
    ],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; `-` reads it from standard input.")] = None,
    user: Annotated[str, typer.Option("--user", "-u", help="User who is charged.")] = "",
    plan: Annotated[
        str | None,
        typer.Option(help="The user's plan; without it, the policy's default.", autocompletion=complete_plan),
    ] = None,
    task_id: Annotated[
        str | None, typer.Option(help="Your own id, for idempotency: a task is executed once per id.")
    ] = None,
    campaign: Annotated[str | None, typer.Option(help="Campaign id.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    messages: Annotated[str | None, typer.Option(help="JSON list of chat messages, instead of a prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Limit of completion tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature, 0 to 2.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id, instead of the route's.")] = None,
    tags: Annotated[str | None, typer.Option(help="JSON object of names and values, for budgets and reports.")] = None,
    parameters: Annotated[
        str | None, typer.Option(help='JSON object of further parameters, such as {"top_p": 0.9, "stop": ["END"]}.')
    ] = None,
    reply_to: Annotated[str | None, typer.Option(help="Stream to which the result is appended.")] = None,
    metadata: Annotated[str | None, typer.Option(help="JSON object that is returned with the result.")] = None,
    wait: Wait = None,
    as_json: JsonOption = False,
) -> int:
    """Put a task on a stream.

    Other users of this machine can see a command line while it runs. Read a private prompt from standard input.

    Example: tollbook publish generation generate_draft "Write a haiku about ledgers." --user u42 --wait 60
    """
    load_redis_alone()
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    options: dict[str, Any] = {
        "user_id": user, "plan": plan, "task_id": task_id, "campaign_id": campaign, "tags": tags, "system": system,
        "messages": messages, "max_tokens": max_tokens, "temperature": temperature, "model": model,
        "reply_to": reply_to, "metadata": metadata,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    fields = cast("TaskFields", {**_parameters(parameters), **given})
    return asyncio.run(_publish(stream, task, text, fields, wait, as_json=as_json))


def _parameters(text: str | None) -> dict[str, Any]:
    """Parse the JSON object of `--parameters`. Errors: typer.BadParameter."""
    from tollbook.schemas.json_text import parse_json

    try:
        found: object = {} if text is None else parse_json(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--parameters")
    return found  # pyright: ignore[reportUnknownVariableType]


def result(
    task_id: Annotated[str, typer.Argument(help="The task's id.", callback=read_call)],
    wait: Wait = None,
    as_json: JsonOption = False,
) -> int:
    """Show a task's result.

    Exit code 0: done; 1: denied, failed or invalid; 4: there is no result (yet).

    Example: tollbook result 5f1c0e0e-1d1b-4a53 --wait 30 --json
    """
    return asyncio.run(_result(task_id, wait, as_json=as_json))


def ping(
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the answer.")] = 10.0,
    as_json: JsonOption = False,
) -> int:
    """Send a ping through the monitoring stream and wait for a worker's "pong".

    Example: tollbook ping
    """
    load_redis_alone()
    return asyncio.run(_publish("monitoring", PING, None, {"task_id": f"ping-{uuid.uuid4()}"}, wait, as_json=as_json))


async def _publish(
    stream: str, task: str, prompt: str | None, fields: TaskFields, wait: float | None, *, as_json: bool
) -> int:
    from tollbook.inference.publisher import Publisher

    async with Publisher() as publisher:
        try:
            entry = await publisher.new_entry(stream, task, prompt, **fields)
        except InvalidTask as exc:
            raise typer.BadParameter(str(exc)) from None
        entry_id = await publisher.send(entry)
        if wait is None:
            answer = {"task_id": entry.task_id, "stream": entry.stream, "entry_id": entry_id}
            typer.echo(json.dumps(answer) if as_json else f"published {entry.task_id} on {entry.stream}")
            return 0
        return await _show(publisher, entry.task_id, wait, as_json=as_json)


async def _result(task_id: str, wait: float | None, *, as_json: bool) -> int:
    load_redis_alone()
    from tollbook.inference.publisher import Publisher

    async with Publisher() as publisher:
        return await _show(publisher, task_id, wait, as_json=as_json)


async def _show(publisher: "Publisher", task_id: str, wait: float | None, *, as_json: bool) -> int:
    from tollbook.inference.errors import ResultTimeout

    try:
        found = await (publisher.wait(task_id, timeout_s=wait) if wait else publisher.result(task_id))
    except ResultTimeout:
        found = None
    if found is None:
        after = f" after {wait:g} s" if wait else ""
        typer.echo(f"tollbook: no result for {task_id}{after}; is a worker running? (`tollbook doctor`)", err=True)
        return NO_RESULT
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        print_result(found)
    return 0 if found.status is TaskStatus.DONE else 1


def _call_text(call: dict[str, Any]) -> str:
    """Return a tool call as one line of text."""
    function = call.get("function")
    return f"{function['name']}({function['arguments']})" if isinstance(function, dict) else json.dumps(call)


def print_result(found: InferenceResult) -> None:
    """Print a result for people."""
    code = found.error_code.value if found.error_code else ""
    rows: list[tuple[str, Any]] = [
        ("task", found.task_id),
        ("status", found.status.value),
        ("user", found.user_id),
        ("model", found.model_used),
        ("tokens", found.token_count or None),
        ("cost", f"${found.cost_usd:f}"),
        ("error", f"{code}: {(found.error or '').removeprefix(code).lstrip(': ')}" if code else None),
        ("finish", found.finish_reason if found.finish_reason != "stop" else None),
        ("refusal", found.refusal),
        ("calls", "\n".join(_call_text(call) for call in found.tool_calls or ()) or None),
        ("content", found.content),
    ]
    for name, value in rows:
        if value is not None:
            first, *rest = [printable(line) for line in str(value).splitlines()] or [""]
            typer.echo(f"{typer.style(f'{name:<9}', bold=True)}{first}")
            for line in rest:
                typer.echo(f"{'':<9}{line}")
