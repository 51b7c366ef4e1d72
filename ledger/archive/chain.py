"""The hash chain: one hash that covers every event up to a point, in order.

An event's digest is SHA-256 over its canonical bytes: id, then the envelope's fields in
their order, each as `<number of bytes>:<text>,` (a netstring, so that no two events have
the same bytes). A chain begins with the digest of the ledger's name; each link is SHA-256
over the head before it and the event's digest. Changing, dropping, adding or swapping an
event changes every head after it.

A segment keeps the first bytes of the head after each of its events, so that verification
finds exactly the first event that is not what was sealed.
"""

import hashlib
from collections.abc import Iterable
from itertools import accumulate
from typing import Final, cast

import pyarrow as pa

from tollbook.ledger.projection.database import connect
from tollbook.schemas.events import ENVELOPE_FIELDS

MARK_BYTES: Final = 8
# The gate writes numbers in plain decimal, so their text can be made again from the number.
_TEXT: Final = {"committed": "coalesce(committed::VARCHAR, '')"}
_FIELDS: Final = [_TEXT.get(name, f"{name}::VARCHAR") for name in ("id", *ENVELOPE_FIELDS)]
_PARTS: Final = ", ".join(f"strlen({field}), ':', {field}, ','" for field in _FIELDS)
_BYTES: Final = f"SELECT encode(concat({_PARTS})) AS bytes FROM events ORDER BY seq"  # noqa: S608 - names only.
_ROWS: Final = 20_000


def genesis(ledger_id: str, partition: int) -> bytes:
    """Return the head before a partition's first event."""
    return hashlib.sha256(f"tollbook ledger {ledger_id} partition {partition}".encode()).digest()


def digests(events: pa.Table) -> list[bytes]:
    """Return the digest of each event of a table of envelope columns, in the order of `seq`."""
    # DuckDB writes the bytes and OpenSSL hashes them, in a fifth of the time that DuckDB's own SHA-256 takes.
    sha256, found = hashlib.sha256, list[bytes]()
    with connect(config={"threads": 1}) as connection:
        connection.register("events", events)
        for batch in connection.execute(_BYTES).to_arrow_reader(_ROWS):
            found += [sha256(each).digest() for each in cast("list[bytes]", batch.column(0).to_pylist())]
    return found


def digest(entry_id: bytes, values: Iterable[bytes]) -> bytes:
    """Return the digest of one event from the raw parts of its stream entry, in the order of the envelope."""
    canonical = b"".join(b"%d:%s," % (len(part), part) for part in (entry_id, *values))
    return hashlib.sha256(canonical).digest()


def extend(head: bytes, links: Iterable[bytes]) -> bytes:
    """Return the head after further events, given their digests."""
    return heads(head, links)[-1]


def heads(head: bytes, links: Iterable[bytes]) -> list[bytes]:
    """Return the head before and after each of further events, given their digests."""
    sha256 = hashlib.sha256
    return list(accumulate(links, lambda before, link: sha256(before + link).digest(), initial=head))
