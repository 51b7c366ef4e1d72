"""Ways in which a prompt, a completion or a password could leak (G10)."""

import json
from pathlib import Path
from typing import Literal

import pytest
import structlog

from tests.system import run_cli, running_system
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.observability.logs import configure_logging

SECRET = "the-prompt-nobody-may-see"


def _crash() -> None:
    prompt = "-".join(("the", "prompt", "nobody", "may", "see"))
    raise RuntimeError(f"a fault that quotes none of {len(prompt)} characters")


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_logged_fault_shows_no_local_variables(
    form: Literal["console", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    """G10: a worker logs a fault with its traceback, whose frames hold prompts and keys."""
    before = structlog.get_config()
    try:
        configure_logging(form=form, level="INFO")
        try:
            _crash()
        except RuntimeError:
            structlog.get_logger("test").exception("task.crashed")
    finally:
        structlog.configure(**before)
    logged = capsys.readouterr().err
    assert "a fault that quotes none" in logged
    assert SECRET not in logged
    assert form != "json" or json.loads(logged)["event"] == "task.crashed"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:hunter2@h:6379/0", "redis://:***@h:6379/0"),
        ("redis://u:hunter2@h/0?db=1", "redis://u:***@h/0?db=1"),
        ("redis://h:6379/0?password=hunter2", "redis://h:6379/0?password=***"),
        ("rediss://h/0?username=u&password=hunter2&db=3", "rediss://h/0?username=u&password=***&db=3"),
        ("unix:///run/redis.sock?password=hunter2", "unix:///run/redis.sock?password=***"),
        ("redis://u:hun?ter#2@h/0", "redis://u:***@h/0"),
        ("redis://h:6379/0", "redis://h:6379/0"),
    ],
)
def test_a_redis_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """G10: redis-py takes the password as a parameter of the query too."""
    assert hide_password(url) == shown


@pytest.mark.slow
async def test_no_command_tells_the_password_of_redis_when_it_is_refused(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    """G10: the error says which server, for people to copy into a ticket."""
    async with running_system(tmp_path / "system", private_server.url), connect(private_server.url) as redis:
        await redis.execute_command("ACL", "SETUSER", "limited", "on", ">hunter2", "~*", "&*", "+@all", "-info", "-get")
        limited = f"redis://limited:hunter2@{private_server.url.rpartition('@')[2]}"
        for command in (("doctor",), ("result", "t1")):
            done = await run_cli(*command, cwd=tmp_path, env={"REDIS_URL": limited})
            assert done.code == 1
            assert "redis://limited:***@" in done.stdout + done.stderr
            assert "hunter2" not in done.stdout + done.stderr
            if command == ("doctor",):
                assert "allow INFO to this user" in done.stdout, "the server runs and the address is right"
                assert "start the server" not in done.stdout
