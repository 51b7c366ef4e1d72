"""What an operator's tools read: pages of metrics as samples, and answers of the health endpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.servers import PATIENCE_S, wait_until
from tollbook.inference.providers.transport import tls_context


@dataclass(frozen=True)
class Samples:
    """One page: values by name and labels."""

    text: str
    values: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    families: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Samples":
        families = list(text_string_to_metric_families(text))
        values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }
        return cls(text, values, {family.name: family.type for family in families})

    def get(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset(labels.items())]

    def all(self, name: str) -> dict[tuple[str, ...], float]:
        """Every series of a name, by the values of its labels in the order of their names."""
        return {
            tuple(value for _, value in sorted(labels)): number
            for (found, labels), number in self.values.items()
            if found == name
        }


async def scrape(url: str) -> Samples:
    async with httpx.AsyncClient(timeout=PATIENCE_S, verify=tls_context()) as client:
        response = await client.get(f"{url}/metrics")
    assert response.status_code == 200, response.text
    return Samples.parse(response.text)


async def scrape_until(url: str, name: str, value: float, **labels: str) -> Samples:
    """Scrape until a sample has this value: a page is kept for a second, and the fold comes after the answer."""

    async def scrape_once() -> Samples | None:
        page = await scrape(url)
        return page if page.values.get((name, frozenset(labels.items()))) == value else None

    page = await wait_until(scrape_once, what=f"{name}{labels} = {value}")
    assert page is not None
    return page


async def health(url: str, what: str) -> tuple[int, dict[str, Any]]:
    async with httpx.AsyncClient(timeout=PATIENCE_S, verify=tls_context()) as client:
        response = await client.get(f"{url}/health/{what}")
    return response.status_code, response.json()


def problems(document: dict[str, Any]) -> dict[str, str]:
    """The failed checks, by name."""
    return {check["check"]: check["found"] for check in document["checks"] if not check["ok"]}


async def wait_until_ready(url: str) -> None:
    """Wait until the process is ready: an answer is kept for a second."""
    await wait_for_problems(url)


async def wait_for_problems(url: str, **words: str) -> dict[str, Any]:
    """Wait until these checks fail, each in these words, and no other does; return the answer.

    What a process says first may be another problem: a process that starts, or loses its server, gets there in steps.
    """
    documents: list[dict[str, Any]] = []

    async def is_told() -> bool:
        status, document = await health(url, "ready")
        found = problems(document)
        assert document["ready"] is (status == 200) is (not found)
        documents.append(document)
        return found.keys() == words.keys() and all(text in found[check] for check, text in words.items())

    await wait_until(is_told, what=f"/health/ready with the problems {words}")
    return documents[-1]
