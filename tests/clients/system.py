"""The system that clients call: the stand-in, `tollbook up` as it is installed, and the front before its gateway."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.clients.front import Front
from tests.clients.scenarios import EMBEDDINGS_MODEL
from tests.servers import PATIENCE_S, wait_until
from tests.system import BackgroundCommand, run_installed
from tollbook.schemas.money import nanousd_from_usd
from tollbook.standin import StandIn

POOR: Final = "poor"
_GATEWAY: Final = re.compile(r"^Gateway: +(http://\S+)/v1 ", re.MULTILINE)
_POLICY: Final = f"""
[plans.penniless]
cap_usd = 0.000001

[prices."{EMBEDDINGS_MODEL}"]
prompt = 0.02
completion = 0
"""


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """What runs. `url` is the gateway's own address; `directory` is where commands are to be run."""

    standin: StandIn
    url: str
    front: Front
    directory: Path
    environment: dict[str, str]

    async def make_key(self, user: str, *options: str) -> str:
        """Make a key by the command line."""
        finished = await self.run("keys", "create", "--user", user, *options, "--json")
        return finished["key"]

    async def ledger_differences(self) -> list[str]:
        """Compare the ledger with the stand-in's book, user by user; return what differs.

        What is assumed of streams that broke off is corrected before.
        """
        await self.run("reconcile", "--json")
        rows = await self.run("spend", "--json")
        ledger = {row["user_id"]: nanousd_from_usd(row["spent_usd"]) for row in rows}
        held = [row["user_id"] for row in rows if nanousd_from_usd(row["reserved_usd"])]
        book = self.standin.book.totals()
        differing = sorted(user for user in ledger.keys() | book if ledger.get(user, 0) != book.get(user, 0))
        return [
            *(f"{user}: {ledger.get(user, 0)} nano-dollars on the ledger, {book.get(user, 0)} in the provider's book"
              for user in differing),
            *(f"{user}: a hold is left" for user in held),
            *await self._unsound(),
        ]  # fmt: skip

    async def _unsound(self) -> list[str]:
        finished = await run_installed("verify", cwd=self.directory, env=self.environment)
        return [f"tollbook verify: {finished.stdout[-1000:]} {finished.stderr[-1000:]}"] if finished.code else []

    async def run(self, *arguments: str) -> Any:
        """Run a command; return the JSON that it prints."""
        finished = await run_installed(*arguments, cwd=self.directory, env=self.environment)
        if finished.code:
            raise AssertionError(f"tollbook {' '.join(arguments)} ended with {finished.code}:\n{finished.stderr}")
        return finished.json()


@asynccontextmanager
async def running_gateway(directory: Path) -> AsyncGenerator[RunningGateway]:
    """Run all of it in a new directory below this one."""
    place = directory / "system"
    place.mkdir(parents=True)
    (place / "tollbook.toml").write_text(_POLICY, "utf-8")
    async with StandIn() as standin:
        environment = {
            "OPENROUTER_BASE_URL": standin.base_url,
            "OPENROUTER_API_KEY": "sk-or-of-the-stand-in",
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_METRICS_PORT": "off",
        }

        async def provider_asked() -> None:
            before = standin.requests
            await wait_until(lambda: standin.requests > before)

        up = await BackgroundCommand.start("up", cwd=place, env=environment, is_installed=True)
        try:
            url = await _address(up)
            async with Front(url, provider_asked) as front:
                yield RunningGateway(standin, url, front, place, environment)
        finally:
            await up.end()


async def _address(up: BackgroundCommand) -> str:
    async def announced() -> str | None:
        if up.process.returncode is not None:
            raise AssertionError(f"tollbook up ended:\n{up.stderr}")
        found = await asyncio.to_thread(_GATEWAY.search, up.stdout)
        return found[1] if found else None

    return await wait_until(announced, PATIENCE_S, what="the address of the gateway") or ""
