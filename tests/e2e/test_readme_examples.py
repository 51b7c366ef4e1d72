"""The examples for publishers, run as the documents show them, against a running system.

If a program that an example needs is missing, its test is skipped and says why; with CI=true it fails.
"""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from docs.generate.markdown import between
from tests.quick import first_quick
from tests.servers import PATIENCE_S
from tests.system import RunningSystem, command_environment, running_system
from tollbook.ledger.server.connection import connect
from tollbook.schemas.results import InferenceResult, TaskStatus

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
PUBLISH: Final = ROOT / "docs" / "publishers" / "publish.md"
RESULTS: Final = ROOT / "docs" / "publishers" / "results.md"
REQUESTS: Final = ROOT / "docs" / "publishers" / "requests.md"
# The last version that runs on Node 18, which Debian 12 has.
NODE_REDIS: Final = "redis@5.8.2"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningSystem]:
    async with connect(server_url) as client:
        await client.flushall()
        await client.function_flush()
    async with running_system(tmp_path_factory.mktemp("examples") / "data", server_url) as system:
        yield system


def example(name: str, page: Path = PUBLISH) -> str:
    """The code block between `<!-- name -->` and `<!-- /name -->`."""
    return between(page.read_text("utf-8"), name).partition("\n")[2].removesuffix("```")


def needs(program: str) -> str:
    """The path of a program; without it the test is skipped, in CI it fails."""
    return shutil.which(program) or missing(f"there is no {program} on the PATH")


def missing(reason: str) -> str:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run every example: {reason}")
    pytest.skip(reason)


async def run(running: RunningSystem, *command: str | Path, cwd: Path) -> str:
    """Run a program that finds the server as an example says, by REDIS_URL; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=command_environment({"REDIS_URL": running.system.redis_url}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def result_of(running: RunningSystem, task_id: str) -> InferenceResult:
    result = await running.system.handle.results.wait(task_id, 10)
    assert result is not None
    return result


async def test_redis_cli_publishes_and_reads_the_result(running: RunningSystem, tmp_path: Path) -> None:
    needs("redis-cli")
    assert re.fullmatch(r"\d+-\d+\n", await run(running, "sh", "-ec", example("redis-cli"), cwd=tmp_path))
    result = await result_of(running, "post-17")
    assert (result.status, result.user_id, result.task_type) == (TaskStatus.DONE, "u42", "generate_draft")
    printed = await run(running, "sh", "-ec", example("redis-cli", RESULTS), cwd=tmp_path)
    assert InferenceResult.model_validate_json(printed) == result


async def test_redis_cli_publishes_json(running: RunningSystem, tmp_path: Path) -> None:
    needs("redis-cli")
    assert re.fullmatch(r"\d+-\d+\n", await run(running, "sh", "-ec", example("redis-cli json"), cwd=tmp_path))
    result = await result_of(running, "post-20")
    assert (result.status, result.metadata) == (TaskStatus.DONE, {"post": 18})


async def test_redis_cli_publishes_parameters(running: RunningSystem, tmp_path: Path) -> None:
    needs("redis-cli")
    written = await run(running, "sh", "-ec", example("redis-cli parameters", REQUESTS), cwd=tmp_path)
    assert re.fullmatch(r"\d+-\d+\n", written)
    assert (await result_of(running, "post-21")).status is TaskStatus.DONE


@pytest.mark.parametrize("page", first_quick(1, [README, PUBLISH]), ids=lambda page: page.name)
async def test_the_publisher_publishes_and_waits(running: RunningSystem, tmp_path: Path, page: Path) -> None:
    code = example("publisher") if page == PUBLISH else first_python(page)
    printed = await run(running, sys.executable, "-c", code, cwd=tmp_path)
    assert re.fullmatch(r"done \[stand-in\] .+ 0\.\d{9}\n", printed)


@pytest.mark.slow
async def test_the_publisher_says_that_redis_is_away(running: RunningSystem, tmp_path: Path) -> None:
    """The example's own handler for it runs, not a traceback."""
    away = "redis://127.0.0.1:1/0"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", example("publisher"), cwd=tmp_path,
        env=command_environment({"REDIS_URL": away}), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert "127.0.0.1:1" in output.decode()


def first_python(page: Path) -> str:
    found = re.search(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.slow
async def test_node_publishes_and_waits(
    running: RunningSystem, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    node = needs("node")
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    directory = cache.mkdir("node-redis") if cache else tmp_path_factory.mktemp("node-redis")
    await asyncio.to_thread(install_node_redis, directory)
    script = directory / "example.mjs"
    script.write_text(example("node"), encoding="utf-8")
    printed = await run(running, node, script, cwd=directory)
    result = await result_of(running, "post-18")
    assert printed == f"done {result.content} {result.cost_usd:f}\n"


def install_node_redis(directory: Path) -> None:
    """Install the client where it is not there yet; kept between runs."""
    if (directory / "node_modules" / "redis" / "package.json").exists():
        return
    npm = needs("npm")
    # Without a package of its own there, npm would install into the project around it.
    (directory / "package.json").write_text('{"private": true}', encoding="utf-8")
    options = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--fetch-retries=1")
    try:
        installed = subprocess.run(
            [npm, "install", *options, NODE_REDIS],
            cwd=directory, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        missing(f"npm did not install {NODE_REDIS} in time")
    else:
        if installed.returncode:
            missing(f"npm could not install {NODE_REDIS}: {installed.stderr.strip()[-300:]}")


async def test_the_go_example_is_well_formed(running: RunningSystem, tmp_path: Path) -> None:
    gofmt = shutil.which("gofmt")
    if gofmt is None:
        pytest.skip("there is no gofmt on the PATH; this example is not run anywhere")
    source = tmp_path / "main.go"
    source.write_text(example("go"), encoding="utf-8")
    assert await run(running, gofmt, "-l", "-e", source, cwd=tmp_path) == "", "gofmt would write it otherwise"
