"""A client on a cluster: it follows redirects, and sends no executed command a second time."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from tests.scripted_server import OK, Answer, Reply, ScriptedServer, scripted_servers, slots_of
from tollbook.ledger.errors import LedgerUnavailable, RedisCannotServe
from tollbook.ledger.server import cluster as cluster_module
from tollbook.ledger.server.connection import ServerClient, connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import explain
from tollbook.ledger.server.slots import SLOTS, key_of, slot_of

KEY = "{tollbook:0}:ledger"
SLOT = slot_of(KEY)
ADD = ("XADD", KEY, "*", "amount", "1")
RECEIVED = [b"XADD", KEY.encode(), b"*", b"amount", b"1"]

Servers = list[ScriptedServer]


def replies(*given: Reply) -> Answer:
    """Answer with these in turn, and then with the last one."""
    left: Iterator[Reply] = iter(given[:-1])
    return lambda _: next(left, given[-1])


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    """Two nodes; the first one has all slots."""
    async with scripted_servers(2) as made:
        for each in made:
            each.slots = slots_of((0, SLOTS - 1, made[0].port))
        yield made


@pytest.fixture
async def client(servers: Servers) -> AsyncIterator[ServerClient]:
    async with connect(f"redis://{servers[0].address}/0") as redis:
        yield redis


@pytest.fixture
async def pipeline(client: ServerClient) -> AsyncIterator[CommandPipeline]:
    pipeline = CommandPipeline(client, timeout_s=10)
    yield pipeline
    await pipeline.aclose()


def moved(to: ScriptedServer) -> bytes:
    return f"-MOVED {SLOT} {to.address}\r\n".encode()


async def test_a_moved_key_is_followed_and_remembered(servers: Servers, pipeline: CommandPipeline) -> None:
    old, new = servers
    old.answer = replies(moved(new))
    new.slots = old.slots = slots_of((0, SLOTS - 1, new.port))
    assert await pipeline.execute(*ADD) == b"OK"
    assert await pipeline.execute(*ADD) == b"OK"
    assert (old.received, new.received) == ([], [RECEIVED, RECEIVED]), "after a new look at the slots"


async def test_a_key_that_moved_again_is_followed(servers: Servers, pipeline: CommandPipeline) -> None:
    old, new = servers
    assert await pipeline.execute("GET", KEY) == b"OK"
    old.answer = replies(moved(new))
    assert await pipeline.execute(*ADD) == b"OK"
    assert (old.received[1:], new.received) == ([RECEIVED], [RECEIVED])


async def test_a_command_goes_with_asking_while_its_key_is_migrating(
    servers: Servers, pipeline: CommandPipeline
) -> None:
    old, new = servers
    old.answer = replies(f"-ASK {SLOT} {new.address}\r\n".encode(), OK)
    assert await pipeline.execute(*ADD) == b"OK"
    assert await pipeline.execute(*ADD) == b"OK"
    # ASK is for one command alone: the next one goes to the old node again.
    assert (old.received, new.received) == ([RECEIVED, RECEIVED], [[b"ASKING"], RECEIVED])


async def test_tryagain_is_retried(servers: Servers, pipeline: CommandPipeline) -> None:
    servers[0].answer = replies(b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n", OK)
    assert await pipeline.execute(*ADD) == b"OK"
    assert servers[0].received == [RECEIVED, RECEIVED]


async def test_a_command_whose_reply_is_lost_is_not_sent_again(servers: Servers, pipeline: CommandPipeline) -> None:
    servers[0].answer = replies(None, OK)
    with pytest.raises(LedgerUnavailable) as unknown:
        await pipeline.execute(*ADD)
    assert not isinstance(unknown.value, RedisCannotServe), "the outcome is unknown"
    assert await pipeline.execute("PING") == b"OK"
    assert [command for server in servers for command in server.received if command == RECEIVED] == [RECEIVED]


async def test_the_client_itself_sends_nothing_again_either(servers: Servers, client: ServerClient) -> None:
    servers[0].answer = replies(None, OK)
    with pytest.raises(RedisConnectionError):
        await client.xadd(KEY, {"amount": "1"})
    assert await client.get("other") == b"OK"
    assert [command for server in servers for command in server.received if command == RECEIVED] == [RECEIVED]


async def test_the_client_itself_follows_a_key(servers: Servers, client: ServerClient) -> None:
    old, new = servers
    assert await client.get(KEY) == b"OK"
    old.answer = replies(moved(new))
    assert await client.get(KEY) == b"OK"
    assert new.received == [[b"GET", KEY.encode()]]


async def test_a_cluster_that_is_down_has_done_nothing(servers: Servers, pipeline: CommandPipeline) -> None:
    servers[0].answer = replies(b"-CLUSTERDOWN The cluster is down\r\n")
    with pytest.raises(RedisCannotServe):
        await pipeline.execute(*ADD)
    assert servers[0].received == [RECEIVED]


async def test_nodes_that_redirect_to_each_other_are_not_asked_for_ever(
    servers: Servers, pipeline: CommandPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "_FOLLOW_S", 0.1)
    first, second = servers
    first.answer, second.answer = replies(moved(second)), replies(moved(first))
    with pytest.raises(RedisCannotServe, match="being moved"):
        await pipeline.execute(*ADD)


async def test_another_node_is_asked_for_the_slots_if_one_is_down(servers: Servers) -> None:
    gone, left = servers
    left.slots = slots_of((0, SLOTS - 1, left.port))
    gone.slots = gone.answer = replies(None)
    async with connect(f"redis://{gone.address},{left.address}/0") as redis:
        assert await redis.get(KEY) == b"OK"
    assert left.received == [[b"GET", KEY.encode()]]


async def test_a_node_that_is_found_while_the_client_is_closed_is_closed_too(servers: Servers) -> None:
    """Other tasks may still send: one waits for a result while another has failed, and ends the client's block."""
    first, second = servers
    async with connect(f"redis://{first.address}/0") as redis:
        assert await redis.get(KEY) == b"OK"
        cluster = await redis.cluster()
        assert cluster is not None
        closing = asyncio.create_task(cluster.aclose())
        await asyncio.sleep(0)
        host, port = second.address.split(":")
        late = cluster.client(cluster_module.Address(host, int(port)))
        await closing
        assert cluster.client(cluster_module.Address(host, int(port))) is not late


async def test_a_node_that_does_not_answer_delays_no_other_command(servers: Servers) -> None:
    silent, left = servers
    left.slots = slots_of((0, SLOTS - 1, left.port))
    silent.slots = replies(b"")  # Nothing comes, and the connection stays.
    async with connect(f"redis://{silent.address},{left.address}/0") as redis:
        for _ in range(2):  # Whichever of them is asked first.
            assert await redis.get(KEY) == b"OK"
            await (await redis.cluster()).refresh()  # pyright: ignore[reportOptionalMemberAccess]


async def test_concurrent_commands_go_in_one_batch_per_node(servers: Servers, pipeline: CommandPipeline) -> None:
    low, high = servers
    low.slots = high.slots = slots_of((0, 8191, low.port), (8192, SLOTS - 1, high.port))
    keys = [f"key-{number}" for number in range(100)]
    assert await pipeline.execute("PING") == b"OK"
    before = pipeline.batches
    assert set(await asyncio.gather(*(pipeline.execute("GET", key) for key in keys))) == {b"OK"}
    assert pipeline.batches == before + 2
    for server, has in ((low, lambda slot: slot < 8192), (high, lambda slot: slot >= 8192)):
        asked = [command[1].decode() for command in server.received if command[0] == b"GET"]
        assert asked == [key for key in keys if has(slot_of(key))]


async def test_every_primary_gets_commands_for_all(servers: Servers, pipeline: CommandPipeline) -> None:
    servers[0].slots = servers[1].slots = slots_of((0, 8191, servers[0].port), (8192, SLOTS - 1, servers[1].port))
    assert await pipeline.execute_on_primaries("FUNCTION", "LOAD", "code") == [b"OK", b"OK"]
    assert [server.received for server in servers] == [[[b"FUNCTION", b"LOAD", b"code"]]] * 2


@pytest.mark.parametrize(
    ("path", "reply", "problem"),
    [
        ("/1", None, "only database 0"),
        ("/0", b"*0\r\n", "has no slots"),
    ],
)
async def test_a_cluster_that_cannot_be_used_is_refused_in_one_line(
    servers: Servers, path: str, reply: bytes | None, problem: str
) -> None:
    if reply is not None:
        servers[0].slots = replies(reply)
    async with connect(f"redis://{servers[0].address}{path}") as redis:
        pipeline = CommandPipeline(redis)
        for _ in range(2):  # It is no accident of the first command.
            with pytest.raises(LedgerUnavailable, match=problem) as refused:
                await pipeline.execute("PING")
            assert "\n" not in str(refused.value)
        await pipeline.aclose()


async def test_several_servers_that_are_no_cluster_are_refused() -> None:
    async with scripted_servers(2) as alone, connect(f"redis://{alone[0].address},{alone[1].address}/0") as redis:
        pipeline = CommandPipeline(redis)
        with pytest.raises(LedgerUnavailable, match="are not a cluster"):
            await pipeline.execute(*ADD)
        await pipeline.aclose()
        assert alone[0].received == alone[1].received == []


async def test_a_user_without_cluster_slots_is_refused_with_the_reason(
    servers: Servers, pipeline: CommandPipeline
) -> None:
    first, second = servers
    first.slots = replies(b"-NOPERM User tollbook has no permissions to run the 'cluster|slots' command\r\n")
    first.answer = replies(moved(second))
    with pytest.raises(ResponseError) as refused:
        await pipeline.execute(*ADD)
    assert "CLUSTER SLOTS" in explain(refused.value)
    assert second.received == []


async def test_a_password_counts_for_every_node(servers: Servers) -> None:
    low, high = servers
    low.slots = high.slots = slots_of((0, 8191, low.port), (8192, SLOTS - 1, high.port))
    async with connect(f"redis://user:p%2Cw%40@{low.address},{high.address}/0") as redis:
        for key in ("key-1", "key-2", "key-3", "key-4"):
            assert await redis.get(key) == b"OK"
    for server in servers:
        assert server.greetings, "it was connected to"
        assert all(greeting[2:5] == [b"AUTH", b"user", b"p,w@"] for greeting in server.greetings)


async def test_a_user_without_cluster_slots_on_several_nodes_is_refused_with_the_reason(servers: Servers) -> None:
    for server in servers:
        server.slots = replies(b"-NOPERM User tollbook has no permissions to run the 'cluster|slots' command\r\n")
    async with connect(f"redis://{servers[0].address},{servers[1].address}/0") as redis:
        pipeline = CommandPipeline(redis)
        with pytest.raises(LedgerUnavailable, match="may not use CLUSTER SLOTS"):
            await pipeline.execute("PING")
        await pipeline.aclose()


async def test_one_server_is_asked_once_whether_it_is_a_cluster() -> None:
    async with scripted_servers(1) as (server,), connect(f"redis://{server.address}/0") as redis:
        asked: list[list[bytes]] = []
        disabled = server.slots
        server.slots = lambda command: [asked.append(command), disabled(command)][1]
        pipeline = CommandPipeline(redis)
        for _ in range(3):
            assert await pipeline.execute("GET", "k") == await redis.get("k") == b"OK"
        await pipeline.aclose()
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("GET", "a"), "a"),
        (("FCALL", "f", 2, "a", "b", "argument"), "a"),
        (("FCALL", "f", 0, "argument"), None),
        (("EVAL", "script", 1, "a"), "a"),
        (("XREAD", "COUNT", 1, "BLOCK", 100, "STREAMS", "a", "0"), "a"),
        (("XREADGROUP", b"GROUP", "g", "c", b"STREAMS", "a", ">"), "a"),
        (("XGROUP", "CREATE", "a", "g", "0"), "a"),
        (("XGROUP CREATE", "a", "g", "0"), "a"),
        (("XINFO", "STREAM", "a"), "a"),
        (("SCAN", "0", "MATCH", "{a}:*"), "{a}:*"),
        (("SCAN", "0"), None),
        (("TIME",), None),
        (("FUNCTION LOAD", "code"), None),
        (("PUBLISH", "a", "message"), "a"),
    ],
)
def test_the_key_of_a_command(command: tuple[str | bytes | int, ...], key: str | None) -> None:
    assert key_of(command) == key


@pytest.mark.parametrize(
    ("key", "slot"),
    # Those of the cluster specification, and hash tags.
    [("123456789", 0x31C3), ("{user1000}.following", slot_of("user1000")), ("foo{}{bar}", slot_of(b"foo{}{bar}")),
     ("foo{{bar}}zap", slot_of("{bar")), ("{tollbook:0}:tail:*", SLOT)],
)  # fmt: skip
def test_the_slot_of_a_key(key: str, slot: int) -> None:
    assert slot_of(key) == slot
