"""The Redis users of docs/operators/deploy.md may do what they need, and no more."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from docs.generate.markdown import between
from tests.system import running_system
from tollbook import Publisher
from tollbook.inference.settings import Settings
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
