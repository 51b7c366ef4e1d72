"""Writes files atomically: a file appears only when it is complete."""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path in the same folder. At the end it replaces `path`; after an error it is removed."""
    with tempfile.TemporaryDirectory(prefix=_prefix(path), dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def remove_parts(path: Path) -> None:
    """Remove this process's temporary files for `path`, before it exits without cleanup."""
    for folder in path.parent.glob(f"{_prefix(path)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(path: Path) -> str:
    return f".{path.name}-{os.getpid()}-"
