"""What the log says of each task: one line when it is finished, one for a dead letter, and no prompt in any."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.system import REPLIES, running_system
from tollbook.inference.setting_tables import CapTable
from tollbook.observability.logs import configure_logging
from tollbook.schemas.results import TaskStatus

STREAM: Final = "analysis"
SECRET: Final = "the-text-of-the-prompt"
PROMPT: Final = f"{SECRET} [[completion_tokens=100]]"
# claude-3-haiku at $0.25 and $1.25 a million.
COST: Final = (len(PROMPT) // 4 + 4) * 250 + 100 * 1_250


def make_task(task_id: str, user: str, **fields: str) -> dict[str, str]:
    return {
        "task": "score_post", "task_id": task_id, "user_id": user, "prompt": PROMPT, "reply_to": REPLIES, **fields,
    }  # fmt: skip


def lines_of(logs: list[Any], event: str, level: str) -> list[dict[str, Any]]:
    return [line for line in logs if (line["event"], line["log_level"]) == (event, level)]


async def test_each_finished_task_is_one_line_and_each_dead_letter_too(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    tasks = [
        make_task("t-done", "u1"),
        make_task("t-denied", "u2"),
        {"task": "ping", "task_id": "t-ping", "reply_to": REPLIES},
        make_task("t-bad", "u3", plan="gold"),
    ]
    with capture_logs() as logs:
        async with running_system(tmp_path / "data", server_url, caps=CapTable(users={"u2": 0})) as running:
            await running.publish(STREAM, tasks)
            answers = await running.answers(task["task_id"] for task in tasks)
            await running.publish(STREAM, [make_task("t-done", "u4")])
            # Stopping lets what is in hand be acknowledged, and so be logged.
        letters: Any = await redis_client.xrange("tollbook:dead-letters")
    assert [each.status for each in answers] == [
        TaskStatus.DONE, TaskStatus.DENIED, TaskStatus.DONE, TaskStatus.INVALID,
    ]  # fmt: skip
    finished = {line["task_id"]: line for line in lines_of(logs, "task.finished", "info") if line["user_id"] != "u4"}
    assert set(finished) == {"t-done", "t-denied", "t-ping"}, "a malformed message is no task"
    done = finished["t-done"]
    assert done.pop("seconds") > 0
    assert done == {
        "event": "task.finished",
        "log_level": "info",
        "task_id": "t-done",
        "user_id": "u1",
        "task_type": "score_post",
        "model": answers[0].model_used,
        "status": "done",
        "cost_usd": f"{Decimal(COST).scaleb(-9):f}",
        "tokens": len(PROMPT) // 4 + 4 + 100,
    }
    assert (finished["t-denied"]["status"], finished["t-denied"]["cost_usd"]) == ("denied", "0.000000000")
    said = lines_of(logs, "task.dead_lettered", "warning")
    reasons = [("invalid_task", "t-bad"), ("idempotency_conflict", "t-done")]
    assert [(line["reason"], line["task_id"]) for line in said] == reasons
    assert [line["letter"] for line in said] == [letter_id.decode() for letter_id, _ in letters]
    assert SECRET not in repr(logs), "G10"


LINE: Final[dict[str, Any]] = {
    "task_id": "t 1", "user_id": "ren\u00e9", "model": None, "status": "done", "cost_usd": "0.000001000", "tokens": 5,
    "seconds": 0.25, "problem": "\x1b[2J", "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_line_can_be_read_in_both_forms(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        configure_logging(form=form, level="INFO")
        structlog.get_logger("test").info("task.finished", **LINE)
        structlog.get_logger("test").info("task.finished", half="\ud800")
    finally:
        structlog.configure(**before)
    line, half = capsys.readouterr().err.splitlines()
    if form == "json":
        document = json.loads(line)
        assert document.pop("timestamp").endswith("Z")
        assert document == {"event": "task.finished", "level": "info", **LINE}
        assert json.loads(half)["half"] == "\ud800"
        return
    stamp, rest = line.split(" ", 1)
    assert stamp.endswith("Z")
    assert rest == (
        "[info     ] task.finished            task_id='t 1' user_id=ren\u00e9 model=None status=done "
        "cost_usd=0.000001000 tokens=5 seconds=0.25 problem='\\x1b[2J' empty=''"
    )
    assert half.endswith(r"half='\ud800'")
