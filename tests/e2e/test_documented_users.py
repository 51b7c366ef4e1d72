"""The Redis users of docs/operators/deploy.md may do what they need, and no more."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
import pytest_asyncio
import standardwebhooks
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from docs.generate.markdown import between
from tests.integration.test_alert_deliveries import served
from tests.servers import wait_until
from tests.system import running_system
from tollbook import Publisher
from tollbook.consumers.alert_tidying import AlertTidying
from tollbook.consumers.policy_following import PolicyFollowing
from tollbook.gateway.server import serve_gateway
from tollbook.inference.key_changes import KeyBounds, KeyChanges
from tollbook.inference.policy_changes import apply_policy
from tollbook.inference.settings import Settings
from tollbook.ledger.errors import PermissionsMissing
from tollbook.ledger.signature import Signature
from tollbook.schemas.policy_rules import StreamRule
from tollbook.schemas.results import TaskStatus

PAGE: Final = Path(__file__).parents[2] / "docs" / "operators" / "deploy.md"


def documented_users() -> dict[str, list[str]]:
    """The rules of each user but the default one, as the page shows them."""
    lines = [line.split() for line in between(PAGE.read_text("utf-8"), "acl").splitlines() if line.startswith("user ")]
    return {name: rules for _, name, *rules in lines if name != "default"}


def password(rules: list[str]) -> str:
    return next(rule[1:] for rule in rules if rule.startswith(">"))


@pytest_asyncio.fixture
async def urls(server_url: str) -> AsyncIterator[dict[str, str]]:
    """The address of the server for each documented user."""
    users = documented_users()
    parts = urlsplit(server_url)
    async with Redis.from_url(server_url) as admin:
        await admin.flushall()
        await admin.function_flush()
        for name, rules in users.items():
            await admin.execute_command("ACL", "SETUSER", name, "reset", *rules)
        yield {
            name: urlunsplit(parts._replace(netloc=f"{name}:{password(rules)}@{parts.hostname}:{parts.port}"))
            for name, rules in users.items()
        }
        await admin.execute_command("ACL", "DELUSER", *users)


async def test_tollbook_and_a_publisher_work_as_their_own_users(urls: dict[str, str], tmp_path: Path) -> None:
    settings = Settings(redis_url=urls["publisher"], data_dir=tmp_path / "elsewhere")
    async with running_system(tmp_path / "data", urls["tollbook"]) as running, Publisher(settings) as publisher:
        result = await publisher.publish_and_wait(
            "generation", "generate_draft", "Write.", user_id="u1", task_id="t1", timeout_s=60
        )
        assert result.status is TaskStatus.DONE
        async with Redis.from_url(urls["publisher"]) as redis:
            for command in (
                ("XRANGE", running.keys.ledger, "-", "+"),
                ("XADD", running.keys.ledger, "*", "type", "credit-granted"),
                ("GET", running.keys.call("t1")),
                ("SET", running.keys.result("t1"), "{}"),
                ("XRANGE", "generation", "-", "+"),
                ("FCALL", "tollbook_v2_assign", 0),
                ("FLUSHALL",),
            ):
                with pytest.raises(NoPermissionError):
                    await redis.execute_command(*command)


async def test_a_gateway_works_as_the_user_of_tollbook(urls: dict[str, str], tmp_path: Path) -> None:
    """Keys, calls, and the retries of SDKs."""
    async with running_system(tmp_path / "data", urls["tollbook"]) as running:
        runtime = running.system.runtime
        changes = KeyChanges(runtime.ledger, runtime.policies, runtime.user_ids)
        made = await changes.create(KeyBounds(user_id="u1"), Signature("ops", "a client"))
        async with (
            serve_gateway(runtime, port=0) as gateway,
            httpx.AsyncClient(headers={"authorization": f"Bearer {made.secret}"}, trust_env=False) as client,
        ):
            reply = await client.post(
                f"{gateway.url}/v1/chat/completions",
                json={"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]},
                headers={"x-stainless-retry-count": "1"},
            )
            assert reply.status_code == 200, reply.text
            await changes.revoke(made.key_id, Signature("ops", "it leaked"))


@pytest.mark.slow
async def test_alerts_are_delivered_and_new_streams_are_read_as_far_as_the_documented_user_may(
    urls: dict[str, str], server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue of alerts needs no more than the page lists; a stream that a policy adds must be among the keys."""
    secret = "whsec_" + base64.b64encode(b"k" * 32).decode()
    policy = tmp_path / "tollbook.toml"
    policy.write_text('[plans.trial]\ncap_usd = 0.0001\nalerts = [1.0]\n[alerts]\nwebhook_env = "ALERT_WEBHOOK"\n')
    async with served(lambda: 204) as (url, seen):
        monkeypatch.setenv("ALERT_WEBHOOK", url)
        given = {"policy_file": policy, "webhook_secret": secret}
        async with running_system(tmp_path / "data", urls["tollbook"], **given) as running:
            settings = Settings(redis_url=urls["publisher"], data_dir=tmp_path / "elsewhere")
            async with Publisher(settings) as publisher:
                result = await publisher.publish_and_wait(
                    "generation", "generate_draft", "Write.", user_id="u1", task_id="t1", timeout_s=60
                )
            assert result.status is TaskStatus.DENIED
            await wait_until(lambda: seen, what="the alert")
            headers, body = seen[0]
            received = standardwebhooks.Webhook(secret).verify(body, headers)
            assert (received["kind"], received["budget"], received["value"]) == ("budget", "user", "u1")
            assert await AlertTidying(running.system.runtime.ledger.gates, keep_s=0).tidy() == 0

            runtime, worker = running.system.runtime, running.workers[0]
            following = PolicyFollowing(runtime, worker, takes_all=True)
            changed = runtime.rules.model_copy(update={"streams": {**runtime.rules.streams, "shop": StreamRule()}})
            await apply_policy(runtime.ledger.gates, changed, Signature("ops", "a shop"))
            with pytest.raises(PermissionsMissing, match="~shop"):
                await following.look()
            async with Redis.from_url(server_url) as admin:
                await admin.execute_command("ACL", "SETUSER", "tollbook", "~shop")
            await following.look()
            assert "shop" in worker.claims.streams
