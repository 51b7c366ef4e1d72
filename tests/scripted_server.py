"""A server that answers by a script, over a real socket: for replies that a real server gives only for moments."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Reply = bytes | None
"""What is written back, as the protocol has it; None closes the connection without an answer."""
Answer = Callable[[list[bytes]], Reply]
OK = b"+OK\r\n"


@dataclass
class ScriptedServer:
    """Records every command; `answer` makes the reply, `slots` that of CLUSTER SLOTS."""

    port: int = 0
    answer: Answer = lambda _: OK
    slots: Answer = lambda _: b"-ERR This instance has cluster support disabled\r\n"
    received: list[list[bytes]] = field(default_factory=list[list[bytes]])
    greetings: list[list[bytes]] = field(default_factory=list[list[bytes]])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (command := await _command(reader)) is not None:
                reply = self._reply(command)
                if reply is None:
                    break
                writer.write(reply)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _reply(self, command: list[bytes]) -> Reply:
        match command:
            case [b"HELLO", *_]:
                self.greetings.append(command)
                return b"%1\r\n+proto\r\n:3\r\n"
            case [b"CLIENT" | b"SELECT", *_]:
                return OK
            case [b"CLUSTER", b"SLOTS"]:
                return self.slots(command)
            case _:
                self.received.append(command)
                return self.answer(command)


def slots_of(*ranges: tuple[int, int, int]) -> Answer:
    """Answer CLUSTER SLOTS with ranges of (first, last, port)."""
    rows = b"".join(b"*3\r\n:%d\r\n:%d\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$2\r\nid\r\n" % each for each in ranges)
    return lambda _: b"*%d\r\n%s" % (len(ranges), rows)


@asynccontextmanager
async def scripted_servers(number: int) -> AsyncIterator[list[ScriptedServer]]:
    """Run this number of servers."""
    made = [ScriptedServer() for _ in range(number)]
    listening: list[asyncio.Server] = []
    try:
        for each in made:
            listening.append(await asyncio.start_server(each.serve, "127.0.0.1", 0))
            each.port = listening[-1].sockets[0].getsockname()[1]
        yield made
    finally:
        for server in listening:
            server.close()


async def _command(reader: asyncio.StreamReader) -> list[bytes] | None:
    head = await reader.readline()
    if not head:
        return None
    parts: list[bytes] = []
    for _ in range(int(head[1:])):
        length = int((await reader.readline())[1:])
        parts.append((await reader.readexactly(length + 2))[:-2])
    return parts
