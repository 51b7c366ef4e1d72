"""Owners of task streams: each stream is served by exactly one Tollbook of a Redis database (G4).

Names of task streams have no namespace, since publishers need not know it. Two Tollbooks on
one stream would take each other's tasks and charge them to the wrong ledger. So the first
Tollbook that serves a stream owns it, and any other is refused before it reads anything.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.server.pipeline import CommandPipeline

# Hash: task stream -> namespace. The braces keep it from being a publisher's `reply_to`.
STREAM_OWNERS: Final = "{tollbook-streams}"


class StreamTaken(LedgerRefused):
    """Another Tollbook serves this task stream."""

    def __init__(self, *, stream: str, owner: str, namespace: str) -> None:
        super().__init__(
            f"the task stream {stream} in this Redis database is served by the Tollbook {owner!r}, this one is "
            f"{namespace!r} (TOLLBOOK_NAMESPACE): give this one its own database, such as redis://host/1. If "
            f"{owner!r} is gone for good: HDEL {STREAM_OWNERS} {stream}"
        )
        self.stream = stream
        self.owner = owner


async def own_streams(pipeline: CommandPipeline, streams: Iterable[str], namespace: str) -> Mapping[str, str]:
    """Become the owner of streams that have none; return the owning namespace of every stream.

    Errors: StreamTaken; LedgerUnavailable.
    """
    streams = tuple(streams)
    for stream in streams:
        await pipeline.execute("HSETNX", STREAM_OWNERS, stream, namespace)
    owners = await read_owners(pipeline)
    for stream in streams:
        check_owner(owners, stream, namespace)
    return owners


async def read_owners(pipeline: CommandPipeline) -> Mapping[str, str]:
    """Return the owning namespace of every stream. Errors: LedgerUnavailable."""
    flat: list[bytes] | dict[bytes, bytes] = await pipeline.execute("HGETALL", STREAM_OWNERS)
    pairs = flat.items() if isinstance(flat, dict) else zip(flat[0::2], flat[1::2], strict=True)
    return {stream.decode(errors="replace"): owner.decode(errors="replace") for stream, owner in pairs}


def check_owner(owners: Mapping[str, str], stream: str, namespace: str) -> None:
    """Check that no other Tollbook owns this stream. Errors: StreamTaken."""
    owner = owners.get(stream, namespace)
    if owner != namespace:  # G4
        raise StreamTaken(stream=stream, owner=owner, namespace=namespace)
