"""Files and folders that only the user who runs Tollbook may read.

Nothing is opened through a symbolic link, and a file is replaced by renaming: another user of the machine can neither
read these files nor redirect a write.
"""

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO


def make_private_folder(path: Path) -> None:
    """Make a folder, with its parents, that only its owner may enter. One that exists stays as it is.

    Errors: OSError.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write a file in one step; an existing one is replaced. Errors: OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # The draft is a new file, so that its mode is right even if a crash left an old draft.
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def create_private(path: Path, text: str) -> None:
    """Make a file that does not exist yet. Errors: FileExistsError; OSError, after which a part may be left."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names of a folder's files are on disk. Errors: OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_private(path: Path) -> str:
    """Read a file, unless it is a link or belongs to another user. Errors: OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
        _check_owner(os.fstat(file.fileno()).st_uid, path)
        return file.read()


def _check_owner(owner: int, path: Path) -> None:
    """Check that a file is this user's or root's: another user's file could send prompts elsewhere, for example.

    Root may read every file, since it also manages the data of services. Errors: PermissionError.
    """
    user = os.geteuid()
    if user != 0 and owner not in (0, user):
        raise PermissionError(errno.EPERM, "the file belongs to another user of this machine", str(path))


def append_private(path: Path) -> BinaryIO:
    """Open a file to append to it, not through a link; make it if it is missing. Errors: OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600), "ab")
