"""Errors of an object store that holds an archive."""

from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable


class ArchiveUnavailable(LedgerUnavailable):
    """The object store did not answer, or cannot serve now. A write may have been done; a repeat is safe."""


class ArchiveRefused(LedgerRefused):
    """The object store denies access with these credentials, has no such bucket, or lacks what Tollbook needs."""
