"""The examples with curl in the documents for callers, run as they stand, with another address and a true key."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.gateway.serving import KEY, Served, open_served

_CALLERS = Path(__file__).resolve().parents[2] / "docs" / "callers"
EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted(_CALLERS.glob("*.md"))
    for number, block in enumerate(re.findall(r"```sh\n(curl .*?)```", page.read_text("utf-8"), re.DOTALL))
]


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path) as served:
        yield served
        await served.calling.check_guarantees()


async def run(command: str, served: Served) -> str:
    """Run an example as a shell does; return what it printed. A status of an error fails."""
    if shutil.which("curl") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must run every example: there is no curl on the PATH")
        pytest.skip("there is no curl on the PATH")
    changed = command.replace("http://127.0.0.1:8788", served.gateway.url).replace("tb-...", KEY)
    assert changed.count(KEY) == 1
    process = await asyncio.create_subprocess_exec(
        "sh", "-ec", changed.replace("curl ", "curl --silent --show-error --fail-with-body --noproxy '*' ", 1),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode == 0, (output, errors)
    return output.decode()


@pytest.mark.parametrize("example", EXAMPLES)
async def test_an_example_is_answered(served: Served, example: str) -> None:
    assert "[stand-in" in await run(example, served)
    assert served.calling.provider.requests == 1


def test_there_are_examples() -> None:
    assert EXAMPLES
