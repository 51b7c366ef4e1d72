"""The example product of docs/examples/agency: run as its page says, from an empty folder with nothing but the file."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import standardwebhooks

from tests.e2e.test_policy_commands import starting
from tests.integration.test_alert_deliveries import served
from tests.servers import wait_until
from tests.system import run_cli

ROOT: Final = Path(__file__).parents[2]
SECRET: Final = "whsec_" + base64.b64encode(b"k" * 32).decode()


@pytest.mark.slow
async def test_the_agency_runs_by_its_file_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "examples" / "agency" / "tollbook.toml", tmp_path)

    async def run(*arguments: str, code: int = 0) -> Any:
        done = await run_cli(*arguments, "--json", cwd=tmp_path, env=env)
        assert done.code == code, done.stderr
        return done.json()

    async def ask(stream: str, task: str, *, code: int = 0, **tags: str) -> Any:
        given = ("--user", "ann", "--tags", json.dumps(tags), "--wait", "50")
        return await run("publish", stream, task, "Write it.", *given, code=code)

    async with served(lambda: 204) as (url, seen):
        env = {"ALERT_WEBHOOK": url, "TOLLBOOK_WEBHOOK_SECRET": SECRET}
        up = await starting("up", "--stand-in", until="Tollbook is up", cwd=tmp_path, env=env)
        try:
            assert (await run("policy", "show"))["policy"]["default_plan"] == "staff"
            answered = await ask("support", "answer_ticket", team="red")
            assert (answered["status"], answered["model_used"]) == ("done", "openai/gpt-4o-mini")
            # A client who has paid nothing gets nothing, and a person is told.
            refused = await ask("campaigns", "write_campaign", code=1, client="acme")
            assert (refused["status"], refused["error_code"]) == ("denied", "PLAN_LIMIT_REACHED")
            await wait_until(lambda: seen, what="the alert of the client's balance")
            headers, body = seen[0]
            received = standardwebhooks.Webhook(SECRET).verify(body, headers)
            assert (received["budget"], received["value"], received["window"]) == ("client", "acme", "total")
            grant = ("credit", "grant", "--budget", "client", "--value", "acme", "--usd", "5", "--id", "pay_1")
            for is_new in (True, False):
                assert (await run(*grant, "--reason", "invoice 7"))["is_new"] is is_new
            written = await ask("campaigns", "write_campaign", client="acme", team="red")
            assert (written["status"], written["model_used"]) == ("done", "anthropic/claude-sonnet-4")

            async def spent() -> dict[Any, Any]:
                rows = (await run_cli("spend", "--budgets", "--json", cwd=tmp_path, env=env)).json()
                found = {(row["name"], row["value"]): row for row in rows}
                return found if ("client", "acme") in found and found["client", "acme"]["spent_usd"] != "0" else {}

            rows = await wait_until(spent, what="the client's spend")
            assert float(rows["client", "acme"]["credit_usd"]) == 5
            assert ("team-week", "red") in rows
            sound = await run_cli("verify", cwd=tmp_path, env=env)
            assert sound.code == 0, sound.stdout
        finally:
            await up.end()
