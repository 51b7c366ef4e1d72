"""The table of docs/callers/clients.md."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from docs.generate.markdown import table, with_part
from tests.clients.catalogue import CLIENTS, Client
from tests.clients.environments import versions
from tests.clients.scenarios import SCENARIOS, Played

PAGE: Final = Path(__file__).parents[2] / "docs" / "callers" / "clients.md"


def write_table(results: Mapping[str, Mapping[str, Played]]) -> None:
    """Write what was seen into the page."""
    head = ("client", "endpoint", *(scenario.title for scenario in SCENARIOS.values()))
    rows = [_row(client, results[client.name]) for client in CLIENTS]
    seen = f"Seen on {datetime.now(UTC):%d %B %Y}:"
    page = with_part(PAGE.read_text("utf-8"), "seen", f"{seen}\n\n{table(head, rows)}")
    PAGE.write_text(page, "utf-8")


def _row(client: Client, played: Mapping[str, Played]) -> list[str]:
    return [f"{client.title} ({versions(client)})", client.api, *(_cell(client, name, played) for name in SCENARIOS)]


def _cell(client: Client, name: str, played: Mapping[str, Played]) -> str:
    if name in client.differs:
        return client.differs[name]
    scenario = SCENARIOS[name]
    if name not in played:
        return "-"
    return "wrong" if scenario.check(played[name]) else scenario.cell(played[name])
