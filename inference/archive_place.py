"""Opening the archive of the settings: in a directory, or in an object store."""

from pathlib import Path

from tollbook.inference.settings import Settings
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.archive.storage import open_storage


def archive_of(settings: Settings) -> Archive:
    """Return the settings' archive; nothing is read yet. Errors: ArchiveRefused."""
    return archive_at(settings.archive_place)


def archive_at(place: str | Path) -> Archive:
    """Return the archive in a directory or at `s3://bucket/prefix`; nothing is read yet. Errors: ArchiveRefused."""
    return Archive(open_storage(place))
