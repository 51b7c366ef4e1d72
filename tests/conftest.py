"""Fixtures for all tests: servers, clients, a clock. See tests/servers.py for which servers there are."""

import asyncio
import gc
import logging
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import structlog
from redis.asyncio import Redis

from tests.chromium import describe_chromium
from tests.deployments import CLUSTER, ONE, SENTINEL
from tests.empty_projections import copy_empty_projections, made_anew, make_folder
from tests.loop_clock import LoopClock
from tests.servers import EMBEDDED, TestServers, describe_servers, drop_functions, server_kinds
from tollbook.ledger.logs import configure_when_used
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer

if TYPE_CHECKING:
    from tests.object_store import ObjectStore, ObjectStoreServer

# No deadline: how long an example takes depends on how busy the machine is, not on whether the code is right.
hypothesis.settings.register_profile("full", deadline=None)
# By default a property is tried with few examples. `python3 dev.py test --slow` tries each again, with many.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tollbook")
    group.addoption("--seed", type=int, default=0, help="seed of the chaos run (default: a new one, which is printed)")
    kinds = (ONE, CLUSTER, SENTINEL)
    group.addoption("--store", choices=kinds, default=ONE, help="servers of the soaking chaos run (default: one)")
    group.addoption("--minutes", type=float, default=5, help="how long the chaos run soaks (default: 5)")


def pytest_configure(config: pytest.Config) -> None:
    # Before xdist starts its workers: they inherit the decision.
    server_kinds()
    # The suite's servers do not sync every write (tests/servers.py); tests of the refusal set this variable anew.
    os.environ.setdefault("TOLLBOOK_ALLOW_UNSYNCED", "1")
    # Tokenizers load in the background, and a hold must not depend on when. Their own tests switch them on.
    os.environ.setdefault("TOLLBOOK_TOKENIZERS", "off")
    if (folder := make_folder()) is not None:
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    copy_empty_projections()
    # The stand-in's book is compared with the ledger by plain user id. Tests of the hashed name set this anew.
    os.environ.setdefault("TOLLBOOK_PROVIDER_USER", "plain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files of many short tests come last: if a process starts a long file at the end, all others wait for it.
    items.sort(key=lambda item: "unit" in item.path.parent.parts)


def pytest_collection_finish(session: pytest.Session) -> None:
    # All that is loaded by now stays in memory; frozen, the garbage collector does not scan it again and again.
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [describe_servers(), describe_chromium()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # The header is not shown with -q, and which servers were missing matters most in a short report.
    terminalreporter.write_line(describe_servers())
    terminalreporter.write_line(describe_chromium())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "every_server_url" in metafunc.fixturenames:
        metafunc.parametrize("every_server_url", server_kinds(), indirect=True, scope="session")


@pytest.fixture(scope="session")
def test_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestServers]:
    """The servers of this process, each started when it is first used."""
    servers = TestServers(tmp_path_factory.mktemp)
    yield servers
    servers.stop()


@pytest.fixture(scope="session")
def server_url(test_servers: TestServers) -> str:
    """The embedded server; not emptied between tests unless `redis_client` is used."""
    return test_servers.url(EMBEDDED)


@pytest.fixture(scope="session")
def every_server_url(test_servers: TestServers, request: pytest.FixtureRequest) -> str:
    """A server of every kind there is, one after the other; for contract tests."""
    return test_servers.url(request.param)


@pytest.fixture
async def redis_client(server_url: str) -> AsyncIterator[Redis]:
    """A client of the embedded server, which is empty at the start of the test."""
    async with connect(server_url) as client:
        await _empty(client)
        yield client


@pytest.fixture
async def every_redis_client(every_server_url: str) -> AsyncIterator[Redis]:
    """A client of a server of every kind, which is empty at the start of the test."""
    async with connect(every_server_url) as client:
        await _empty(client)
        yield client


@pytest.fixture(scope="session")
def object_store_server() -> "Iterator[ObjectStoreServer]":
    """An S3 server in this process."""
    from tests.object_store import ObjectStoreServer  # It takes a second to load, and few tests need it.

    server = ObjectStoreServer()
    yield server
    server.close()


@pytest.fixture
def bucket(object_store_server: "ObjectStoreServer") -> "Iterator[ObjectStore]":
    """A bucket of the test's own. Its address and keys are in this process's environment."""
    from tests.object_store import object_store

    with object_store(object_store_server) as store:
        yield store


@pytest.fixture
async def private_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A durable server of the test's own, which it may kill and start again."""
    server = EmbeddedServer(tmp_path / "data", fsync="always")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def projections_made_anew() -> Iterator[None]:
    """Make new projections as users do, instead of copying empty ones (tests/empty_projections.py)."""
    with made_anew():
        yield


@pytest.fixture
async def loop_clock() -> LoopClock:
    """The clock of the test's own event loop, to be set forward."""
    return LoopClock(asyncio.get_running_loop())


async def _empty(client: Redis) -> None:
    await client.flushall()
    await drop_functions(client)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Reset logging after each test.

    A command that a test runs in this process logs to that test's standard error, which is closed afterwards. It may
    also have left logging to be set up with the first line of a later test.
    """
    yield
    configure_when_used(None)
    structlog.reset_defaults()
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
            logging.getLogger().removeHandler(handler)
