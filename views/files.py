"""Files that appear only when they are whole."""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Lend the name of a new file in the same folder; it takes the place of `path` at the end, or is removed."""
    with tempfile.TemporaryDirectory(prefix=_prefix(path), dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def remove_parts(path: Path) -> None:
    """Remove what this process has written so far in place of `path`, before it ends without unwinding."""
    for folder in path.parent.glob(f"{_prefix(path)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(path: Path) -> str:
    return f".{path.name}-{os.getpid()}-"
