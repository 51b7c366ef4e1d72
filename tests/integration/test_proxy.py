"""The faulty proxy itself: what it must pass on for the tests that use it."""

import asyncio
import socket
import struct
from urllib.parse import urlsplit

from tests.proxy import faulty_proxy
from tests.servers import PATIENCE_S

_RESETS_WHEN_CLOSED = struct.pack("ii", 1, 0)


async def test_a_client_that_resets_its_connection_is_gone_for_the_server_too() -> None:
    was_greeted, is_gone = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        was_greeted.set()
        await reader.read()
        writer.close()
        is_gone.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, faulty_proxy(f"redis://127.0.0.1:{port}/0") as proxy:
        client = socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port))
        await asyncio.wait_for(was_greeted.wait(), PATIENCE_S)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETS_WHEN_CLOSED)
        client.close()
        await asyncio.wait_for(is_gone.wait(), PATIENCE_S)
