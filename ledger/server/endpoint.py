"""Where a running Tollbook is reached: a file in the data directory, for the other commands.

Invariant: the file is complete or absent (written aside, then renamed), readable by its owner
only (a Redis URL may hold a password), and used only while the process that wrote it lives.
"""

import os
import sys
import time
from pathlib import Path
from typing import Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from tollbook.ledger.errors import LedgerError
from tollbook.ledger.private_files import make_private_folder, read_private, write_private
from tollbook.schemas.problems import as_text, problems_of

_NAME: Final = "endpoint.json"
# The compared clocks tick in hundredths of a second, and may be adjusted in between.
_SLACK_S: Final = 1.0


class EndpointError(LedgerError):
    """The endpoint file cannot be read or written; the message says what to do."""


class Endpoint(BaseModel):
    """How to reach the parts of a running Tollbook."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    redis_url: str = Field(repr=False)
    namespace: str
    provider_url: str | None = None
    stand_in_url: str | None = None
    pid: int = Field(gt=0)
    started_at: AwareDatetime


def write_endpoint(data_dir: Path, endpoint: Endpoint) -> None:
    """Publish an endpoint, which replaces any other.

    Errors: EndpointError.
    """
    path = data_dir / _NAME
    try:
        make_private_folder(data_dir)
        write_private(path, endpoint.model_dump_json(indent=2) + "\n")
    except OSError as exc:
        raise EndpointError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def read_endpoint(data_dir: Path) -> Endpoint | None:
    """Return the endpoint of the Tollbook that runs on this data directory; None if none runs.

    Errors: EndpointError if the file exists but is not readable, or is damaged.
    """
    path = data_dir / _NAME
    endpoint = _load(path)
    if endpoint is None or not _is_alive(endpoint.pid, endpoint.started_at.timestamp()):
        return None
    return endpoint


def clear_endpoint(data_dir: Path, *, pid: int | None = None) -> None:
    """Remove the endpoint that process `pid` (None: this process) has published; that of another process stays.

    Errors: EndpointError.
    """
    path = data_dir / _NAME
    endpoint = _load(path)
    if endpoint is None or endpoint.pid != (pid or os.getpid()):
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise EndpointError(f"{path} cannot be removed: {exc.strerror or exc}") from exc


def _load(path: Path) -> Endpoint | None:
    try:
        return Endpoint.model_validate_json(read_private(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise EndpointError(
            f"{path} cannot be read: {exc.strerror or exc}; run this command as the user who runs Tollbook"
        ) from exc
    except ValidationError as exc:
        # No value is shown: it may hold a password.
        problem = as_text(problems_of(exc, Endpoint, hides=lambda _: True))
        raise EndpointError(f"{path} is damaged ({problem}): remove it and start Tollbook again") from exc


def _is_alive(pid: int, seen_alive_s: float) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Another user's process; it is alive.
        pass
    except OverflowError:
        return False
    return not _is_zombie_or_younger(pid, seen_alive_s)


def _is_zombie_or_younger(pid: int, moment_s: float) -> bool:
    """Whether the pid is now a zombie's, or that of a process that began after `moment_s` (Unix time).

    Containers reuse the same few pids at each start. Only Linux tells; elsewhere, False.
    """
    if sys.platform != "linux":
        return False
    try:
        # The name in parentheses may itself hold spaces; see proc(5) for the fields after it.
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        state, start_ticks = fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return False
    booted_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    started_s = booted_s + start_ticks / os.sysconf("SC_CLK_TCK")
    return state == "Z" or started_s > moment_s + _SLACK_S
