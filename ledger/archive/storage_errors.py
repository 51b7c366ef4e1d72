"""What is wrong with an object store that an archive is in."""

from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable


class ArchiveUnavailable(LedgerUnavailable):
    """The object store did not answer, or cannot serve now. What was to be written may be there: a repeat is safe."""


class ArchiveRefused(LedgerRefused):
    """The object store lets nobody in with these credentials, has no such bucket, or lacks what Tollbook needs."""
