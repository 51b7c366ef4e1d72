"""The machine of a run: processor and versions."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from tollbook.ledger.server.embedded import EmbeddedServer

_PACKAGES: Final = ("redis", "hiredis", "duckdb", "pyarrow", "httpx", "aiohttp", "faststream", "uvloop")


def describe_machine(server_version: str) -> dict[str, Any]:
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "server": server_version,
        "packages": {name: version(name) for name in _PACKAGES},
    }


async def server_version(directory: Path) -> str:
    """Read name and version from the embedded server."""
    async with EmbeddedServer(directory) as server, Redis.from_url(server.url) as redis:
        info: dict[str, Any] = await redis.info("server")
    return f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
