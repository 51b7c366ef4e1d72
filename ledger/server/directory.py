"""The directory of an embedded server: its locks, port, password and log.

Invariant: at most one server process uses a directory, since two would interleave their
writes in one append-only file. The kernel ensures it: the server inherits the locked file
`server.lock` and so holds the lock exactly as long as it lives, even if the process that
started it was killed. That process holds `owner.lock` in the same way, so that an orphaned
server can be told from one in use. Neither lock can be stale, whatever happens to pids.
"""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tollbook.ledger.errors import LedgerError
from tollbook.ledger.private_files import make_private_folder, read_private, write_private

_LOG_LIMIT_BYTES: Final = 16 << 20
# Below this, Valkey cannot create the files that it starts with.
_DISK_FLOOR_BYTES: Final = 1 << 20


class EmbeddedServerError(LedgerError):
    """The embedded server cannot start or has ended; the message says why and what to do."""


class DirectoryInUse(EmbeddedServerError):
    """Another process runs a server on the directory."""


class ServerDirectory:
    """One directory, used by one server at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._owner_lock: int | None = None

    @property
    def log(self) -> Path:
        """The server's log, of this and earlier runs."""
        return self.path / "valkey.log"

    @property
    def pid_file(self) -> Path:
        """Where the server writes its process id."""
        return self.path / "valkey.pid"

    def claim(self) -> None:
        """Make the directory and become its owner, until `release` or the end of this process.

        Errors: DirectoryInUse; EmbeddedServerError if it cannot be written.
        """
        if self._owner_lock is not None:
            return
        with self._translated():
            make_private_folder(self.path.parent)
            make_private_folder(self.path)
            lock = _try_lock(self.path / "owner.lock")
            if lock is None:
                owner = (self.path / "owner.lock").read_text("ascii", "replace").strip() or "unknown"
                raise DirectoryInUse(
                    f"another Tollbook (pid {owner}) runs the embedded server on {self.path}: stop it, "
                    "or use its server: `tollbook url` prints where it is"
                )
            self._owner_lock = lock
            _write(lock, str(os.getpid()))
            if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT_BYTES:
                self.log.replace(self.log.with_suffix(".log.1"))

    def release(self) -> None:
        """Release the directory, so that another process can own it."""
        if self._owner_lock is not None:
            os.close(self._owner_lock)
            self._owner_lock = None

    def try_server_lock(self) -> int | None:
        """Return the lock that the server inherits, as an open file; None while a server uses the directory.

        Errors: EmbeddedServerError if the directory cannot be written.
        """
        with self._translated():
            return _try_lock(self.path / "server.lock")

    @property
    def port(self) -> int | None:
        """The port of the server that uses the directory, or of the last one that did."""
        try:
            return int((self.path / "port").read_text("ascii"))
        except (OSError, ValueError):
            return None

    @property
    def pid(self) -> int | None:
        """The process id of the server that uses the directory, as the server wrote it."""
        try:
            return int(self.pid_file.read_text("ascii"))
        except (OSError, ValueError):
            return None

    @property
    def password(self) -> str:
        """The password of this directory's server, made at its first start.

        Errors: EmbeddedServerError where it cannot be read or written.
        """
        path = self.path / "password"
        with self._translated():
            if not path.exists() or not path.stat().st_size:
                write_private(path, secrets.token_urlsafe(32))
            return read_private(path).strip()

    @property
    def config(self) -> Path:
        """The server's configuration file. It holds the password, since every user can see a command line."""
        path = self.path / "valkey.conf"
        password = self.password
        with self._translated():
            write_private(path, f"requirepass {password}\n")
        return path

    def keep_port(self, port: int) -> None:
        """Store the port before the server starts, so that an orphan can always be reached."""
        with self._translated():
            write_private(self.path / "port", f"{port}\n")

    @property
    def is_disk_full(self) -> bool:
        """Whether the disk is full. The server's log cannot say so: it is on the same disk."""
        try:
            return shutil.disk_usage(self.path).free < _DISK_FLOOR_BYTES
        except OSError:
            return False

    def log_size(self) -> int:
        """Return the length of the log in bytes, for `log_since`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_since(self, offset: int) -> str:
        """Return what the server has logged after `offset` bytes, at most the last 64 KiB of it."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(offset, self.log_size() - (64 << 10)))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except OSError as exc:
            raise self._error(exc) from exc

    def _error(self, exc: OSError) -> EmbeddedServerError:
        """Return the error of the operating system as one sentence, with what to do."""
        match exc.errno:
            case errno.ENOSPC | errno.EDQUOT:
                return EmbeddedServerError(f"the disk of {self.path} is full: free some space and start again")
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return EmbeddedServerError(f"{self.path} is not writable: set TOLLBOOK_DATA_DIR to a directory that is")
            case errno.ENOTDIR | errno.EEXIST:
                return EmbeddedServerError(f"{self.path} is not a directory: set TOLLBOOK_DATA_DIR to one")
            case _:
                return EmbeddedServerError(f"{self.path} cannot be used: {exc.strerror or exc}")


def _try_lock(path: Path) -> int | None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:
        os.close(file)
        raise
    return file


def _write(file: int, text: str) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode("ascii"), 0)
