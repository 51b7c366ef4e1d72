"""A budget's alert reaches a webhook, from a task on a stream to a signed message."""

import base64
import json
from pathlib import Path

import pytest
import standardwebhooks
from redis.asyncio import Redis

from tests.integration.test_alert_deliveries import served
from tests.servers import wait_until
from tests.system import REPLIES, run_cli, running_system
from tollbook.consumers.alerts.queue import AlertQueue
from tollbook.schemas.results import TaskStatus

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
POLICY = """
    [plans.small]
    cap_usd = 0.2
    alerts = [0.0001]

    [[budgets]]
    name = "team-week"
    by = ["team"]
    window = "week"
    cap_usd = 0.05
    alerts = [0.01, 1.0]

    [alerts]
    webhook_env = "ALERT_WEBHOOK"
"""


def task(number: int) -> dict[str, str]:
    return {
        "task": "generate_draft", "user_id": "u1", "plan": "small", "team": "red", "task_id": f"t{number}",
        "prompt": "a post", "reply_to": REPLIES,
    }  # fmt: skip


@pytest.mark.slow
async def test_a_task_that_passes_a_fraction_of_a_cap_is_sent_to_a_webhook(
    redis_client: Redis, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tollbook.toml").write_text(POLICY)
    async with served(lambda: 204) as (url, seen):
        monkeypatch.setenv("ALERT_WEBHOOK", url)
        settings = {"policy_file": tmp_path / "tollbook.toml", "webhook_secret": SECRET}
        async with running_system(tmp_path / "data", server_url, metrics_port=0, **settings) as running:
            await running.publish("generation", [task(1)])
            assert [each.status for each in await running.answers(["t1"])] == [TaskStatus.DONE]
            await wait_until(lambda: len(seen) == 2, what="the alerts of the plan and the team")
            # A refusal raises the alert of the whole cap.
            refused = [task(number) for number in range(2, 40)]
            await running.publish("generation", refused)
            answers = await running.answers([each["task_id"] for each in refused])
            assert TaskStatus.DENIED in {each.status for each in answers}
            await wait_until(lambda: len(seen) == 3, what="the alert of the whole cap")
            queue = AlertQueue(running.redis, "tollbook")
            await wait_until(lambda: _delivered(queue), what="the deliveries to be noted")
        received = [standardwebhooks.Webhook(SECRET).verify(body, headers) for headers, body in seen]
        assert sorted((each["budget"], each["value"], each["fraction"]) for each in received) == [
            ("team-week", "red", "0.01"),
            ("team-week", "red", "1"),
            ("user", "u1", "0.0001"),
        ]
        environment = {"REDIS_URL": server_url, "TOLLBOOK_DATA_DIR": str(tmp_path / "data")}
        listed = await run_cli("alerts", "list", "--json", cwd=tmp_path, env=environment)
        assert {each["id"] for each in json.loads(listed.stdout)} == {each["id"] for each in received}
        signed = environment | {"ALERT_WEBHOOK": url, "TOLLBOOK_WEBHOOK_SECRET": SECRET}
        tried = await run_cli("alerts", "test", cwd=tmp_path, env=signed)
        assert (tried.code, tried.stdout) == (0, "webhook: accepted the alert\n")
        assert json.loads(seen[-1][1])["kind"] == "test"
        failed = await run_cli("alerts", "test", cwd=tmp_path, env=signed | {"ALERT_WEBHOOK": "http://127.0.0.1:9/"})
        assert (failed.code, failed.stderr) == (1, "webhook: did not accept the alert: no answer (ConnectError)\n")


async def _delivered(queue: AlertQueue) -> bool:
    return [(state.delivered, state.problem) for state in await queue.states()] == [(3, None)]
