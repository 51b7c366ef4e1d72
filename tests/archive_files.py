"""The files of an archive in a directory, for tests that damage or compare them."""

from pathlib import Path

from tollbook.ledger.archive.segments import Archive, Segment


def file_of(segment: Segment) -> Path:
    return Path(segment.place)


def directory_of(archive: Archive) -> Path:
    return Path(archive.place)
