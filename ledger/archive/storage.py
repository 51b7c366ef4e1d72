"""Where an archive's files are: a directory, or a bucket of an object store. Callers need not know which.

A file has a name with one folder in it, `partition-0/000000000001-000000100000.json`. It appears whole or not at all,
and is never changed. A missing file is a FileNotFoundError in every storage.
"""

import contextlib
import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from tollbook.ledger.archive.storage_errors import ArchiveRefused
from tollbook.ledger.private_files import make_private_folder

_S3: Final = "s3://"


class Storage(Protocol):
    """The contract of a storage. All methods block.

    Errors of each: OSError; ArchiveUnavailable and ArchiveRefused of an object store.
    """

    @property
    def place(self) -> str:
        """The place, for people: a path, or an address without any secret."""
        ...

    @property
    def directory(self) -> Path | None:
        """The directory, if the files are on a disk of this machine; else None."""
        ...

    def located(self, name: str) -> str:
        """Return the path or address of a file, for people."""
        ...

    def names(self, folder: str | None = None) -> list[str]:
        """Return the names of all files, or those of one folder, in order."""
        ...

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch small files that are read next, all at once, if the storage is remote."""
        ...

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        ...

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        ...

    def file(self, name: str) -> AbstractContextManager[Path]:
        """Yield a local file with the content, which is valid during the block only."""
        ...

    def files(self, names: Sequence[str]) -> Generator[list[Path]]:
        """Yield local files with the content, in order and in groups; each group is valid until the next."""
        ...

    def creating(self, name: str) -> AbstractContextManager[Path]:
        """Yield a path to write to; after the block, the written file appears under the name, whole.

        A directory replaces an existing file. An object store never does: equal content counts as written, other
        content is a FileExistsError.
        """
        ...

    def check_writing(self, name: str) -> None:
        """Check that files can be created beside the existing file `name`; changes nothing."""
        ...

    def set_aside(self, names: Sequence[str], *, suffix: str) -> str:
        """Move files, in the given order, into a place beside this one; return its path or address."""
        ...


class ObjectStore(Storage, Protocol):
    """A storage whose objects others can read by an address. Objects that are no part of an archive can be replaced."""

    def replace(self, name: str, file: Path) -> None:
        """Store a local file under a name, in one step; an existing object is replaced."""
        ...


def open_storage(place: str | Path) -> Storage:
    """Return the storage at a directory, or at an address `s3://bucket/prefix`; nothing is read or made yet.

    Errors: ArchiveRefused if the extra for object stores is missing, or the address is not valid.
    """
    return open_object_store(str(place)) if str(place).startswith(_S3) else Directory(Path(place))


def open_object_store(url: str) -> ObjectStore:
    """Return the object store at `s3://bucket/prefix`; nothing is sent yet. Errors: as `open_storage`."""
    try:
        from tollbook.ledger.archive.s3 import open_s3
    except ModuleNotFoundError as exc:
        if exc.name is None or not exc.name.startswith("botocore"):
            raise
        raise ArchiveRefused("object stores need an extra: pip install 'tollbook[s3]'") from None
    return open_s3(url)


class Directory:
    """Files below a directory. They are written under a temporary name, synced and renamed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def place(self) -> str:
        """As `Storage.place`."""
        return str(self._path)

    @property
    def directory(self) -> Path | None:
        """As `Storage.directory`."""
        return self._path

    def located(self, name: str) -> str:
        """As `Storage.located`."""
        return str(self._path / name)

    def names(self, folder: str | None = None) -> list[str]:
        """As `Storage.names`."""
        found = self._path.glob(f"{folder or 'partition-*'}/*")
        # Names of drafts begin with a dot.
        return sorted(f"{path.parent.name}/{path.name}" for path in found if path.name[0] != ".")

    def prefetch(self, names: Sequence[str]) -> None:
        """As `Storage.prefetch`: nothing to do on a disk."""

    def read(self, name: str) -> bytes:
        """As `Storage.read`."""
        return (self._path / name).read_bytes()

    def size(self, name: str) -> int:
        """As `Storage.size`."""
        return (self._path / name).stat().st_size

    @contextlib.contextmanager
    def file(self, name: str) -> Generator[Path]:
        """As `Storage.file`."""
        yield self._path / name

    def files(self, names: Sequence[str]) -> Generator[list[Path]]:
        """As `Storage.files`: all in one group."""
        yield [self._path / name for name in names]

    @contextlib.contextmanager
    def creating(self, name: str) -> Generator[Path]:
        """As `Storage.creating`."""
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        try:
            yield draft
            _sync(draft)
            draft.replace(path)
            _sync(path.parent)
        finally:
            draft.unlink(missing_ok=True)

    def check_writing(self, name: str) -> None:
        """As `Storage.check_writing`."""
        if not os.access((self._path / name).parent, os.W_OK):
            raise PermissionError(13, "no permission to write", str((self._path / name).parent))

    def set_aside(self, names: Sequence[str], *, suffix: str) -> str:
        """As `Storage.set_aside`."""
        target = self._path.with_name(self._path.name + suffix)
        for name in names:
            make_private_folder((target / name).parent)
            (self._path / name).rename(target / name)
        return str(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
