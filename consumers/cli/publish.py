"""`tollbook publish`, `result` and `ping`: put a task on a stream, read what came of it."""

import asyncio
import json
import uuid
from typing import Annotated, Any

import typer

from schemas.results import InferenceResult, TaskStatus
from schemas.tasks import InvalidTask, TaskStream, TaskType, task_from_fields

NO_RESULT = 4

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Wait = Annotated[float | None, typer.Option(min=0, help="Wait up to so many seconds for the result.")]


def publish(
    stream: Annotated[TaskStream, typer.Argument(help="The task stream.")],
    task: Annotated[TaskType, typer.Argument(help="What is to be done.")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; `-` reads it from standard input.")] = None,
    user: Annotated[str, typer.Option("--user", "-u", help="Who is charged.")] = "",
    plan: Annotated[str, typer.Option(help="trial, starter or growth.")] = "trial",
    task_id: Annotated[str | None, typer.Option(help="Your own id; makes a repeat harmless.")] = None,
    campaign: Annotated[str | None, typer.Option(help="Campaign id.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    messages: Annotated[str | None, typer.Option(help="JSON list of chat messages, instead of a prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Completion tokens at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 to 2.")] = None,
    model: Annotated[str | None, typer.Option(help="Model id, instead of the route's.")] = None,
    reply_to: Annotated[str | None, typer.Option(help="Stream to which the result is appended.")] = None,
    metadata: Annotated[str | None, typer.Option(help="JSON object, handed back with the result.")] = None,
    wait: Wait = None,
    as_json: Json = False,
) -> int:
    """Put a task on a stream.

    Example: tollbook publish generation generate_draft "Write a haiku about ledgers." --user u42 --wait 60
    """
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    fields = {
        "task": task.value,
        "user_id": user,
        "plan": plan,
        "task_id": task_id or str(uuid.uuid4()),
        "campaign_id": campaign,
        "prompt": text,
        "system": system,
        "messages": messages,
        "max_tokens": None if max_tokens is None else str(max_tokens),
        "temperature": None if temperature is None else str(temperature),
        "model": model,
        "reply_to": reply_to,
        "metadata": metadata,
    }
    entry = {name: value for name, value in fields.items() if value}
    try:
        task_from_fields(entry)
    except InvalidTask as exc:
        raise typer.BadParameter(str(exc)) from None
    return asyncio.run(_publish(stream.value, entry, wait, as_json=as_json))


def result(
    task_id: Annotated[str, typer.Argument(help="The task's id.")],
    wait: Wait = None,
    as_json: Json = False,
) -> int:
    """Show a task's result. Exit code 0 done, 1 not done (denied, failed, invalid), 4 no result (yet).

    Example: tollbook result 5f1c0e0e-1d1b-4a53 --wait 30 --json
    """
    return asyncio.run(_result(task_id, wait, as_json=as_json))


def ping(
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the answer.")] = 10.0,
    as_json: Json = False,
) -> int:
    """Send a ping through the monitoring stream and wait for a worker's "pong".

    Example: tollbook ping
    """
    entry = {"task": TaskType.PING.value, "task_id": f"ping-{uuid.uuid4()}"}
    return asyncio.run(_publish(TaskStream.MONITORING.value, entry, wait, as_json=as_json))


async def _publish(stream: str, entry: dict[str, str], wait: float | None, *, as_json: bool) -> int:
    from consumers.cli.connect import connected
    from consumers.stream_owners import check_owner
    from inference.settings import load_settings

    settings = load_settings()
    async with connected(settings) as connection:
        await check_owner(connection.pipeline, stream, settings.namespace)
        flat = [part for pair in entry.items() for part in pair]
        entry_id: bytes = await connection.pipeline.execute("XADD", stream, "*", *flat)
        if wait is None:
            answer = {"task_id": entry["task_id"], "stream": stream, "entry_id": entry_id.decode()}
            typer.echo(json.dumps(answer) if as_json else f"published {entry['task_id']} on {stream}")
            return 0
        return _show(await connection.results.wait(entry["task_id"], wait), entry["task_id"], wait, as_json=as_json)


async def _result(task_id: str, wait: float | None, *, as_json: bool) -> int:
    from consumers.cli.connect import connected
    from inference.settings import load_settings

    async with connected(load_settings()) as connection:
        found = await (connection.results.wait(task_id, wait) if wait else connection.results.get(task_id))
        return _show(found, task_id, wait, as_json=as_json)


def _show(found: InferenceResult | None, task_id: str, wait: float | None, *, as_json: bool) -> int:
    if found is None:
        after = f" after {wait:g} s" if wait else ""
        typer.echo(f"tollbook: no result for {task_id}{after}; is a worker running? (`tollbook doctor`)", err=True)
        return NO_RESULT
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        _print(found)
    return 0 if found.status is TaskStatus.DONE else 1


def _print(found: InferenceResult) -> None:
    from rich.table import Table
    from rich.text import Text

    from consumers.tables import make_console

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows: list[tuple[str, Any]] = [
        ("task", found.task_id),
        ("status", Text(found.status.value, style="green" if found.status is TaskStatus.DONE else "red")),
        ("user", found.user_id),
        ("model", found.model_used),
        ("tokens", found.token_count or None),
        ("cost", f"${found.cost_usd:f}"),
        ("error", f"{found.error_code.value}: {found.error}" if found.error_code else None),
        ("content", found.content),
    ]
    for name, value in rows:
        if value is not None:
            table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    make_console().print(table)
