"""Files with the metrics addresses of running processes, one per process, for Prometheus's `file_sd_configs`.

Invariant: a file exists while its process lives. Each process locks its own file, and the kernel releases the lock
however the process ends. A process that starts removes files without a lock. Process ids would not work, because
containers that share a data directory have separate ids.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tollbook.ledger.errors import LedgerError

_FOLDER: Final = "metrics"


class AddressError(LedgerError):
    """The address cannot be written; the message says where and why."""


@contextmanager
def announced_address(data_dir: Path, name: str, address: str, *, part: str) -> Generator[Path]:
    """Write the address for as long as this is open. Errors: AddressError."""
    folder = data_dir / _FOLDER
    path, draft = folder / f"{name}.json", folder / f".{name}.{os.getpid()}"
    document = [{"targets": [address], "labels": {"part": part}}]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(data_dir)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        file = os.fdopen(os.open(draft, flags, 0o666), "w", encoding="utf-8")
    except OSError as exc:
        problem = (
            f"{folder} cannot be written ({exc.strerror or exc}): set TOLLBOOK_DATA_DIR to a directory that can be"
        )
        raise AddressError(problem) from exc
    with file:
        # Lock before the rename, so that nobody finds the file without its lock.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(document) + "\n")
        file.flush()
        draft.replace(path)
        try:
            yield path
        finally:
            # Unless another process has replaced the file in the meantime.
            with contextlib.suppress(OSError):
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    path.unlink()


def remove_abandoned(data_dir: Path) -> None:
    """Remove the files of processes that have ended without removing them."""
    for path in (data_dir / _FOLDER).glob("*.json"):
        with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
