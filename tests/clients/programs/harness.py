"""What the Python programs share: the scenarios' prompts, and one line of JSON for each scenario.

A program gets `GATEWAY` (an address that ends with the client's name; the scenario's name is the next part of the
path, so that the driver knows which request belongs to which), `GATEWAY_KEY`, `POOR_KEY` and `MODEL`.
"""

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

PROMPTS = json.loads(os.environ["PROMPTS"])
MODEL = os.environ["MODEL"]
EMBEDDINGS_MODEL = os.environ["EMBEDDINGS_MODEL"]
KEY = os.environ["GATEWAY_KEY"]
POOR_KEY = os.environ["POOR_KEY"]
SYSTEM = "Be brief."
TOOL = {
    "name": "look_up",
    "description": "Look a thing up by its number.",
    "parameters": {
        "type": "object",
        "properties": {"id": {"type": "integer", "description": "Its number."}},
        "required": ["id"],
        "additionalProperties": False,
    },
}


class City(BaseModel):
    """What is asked for as structured output."""

    name: str
    population: int
    districts: list[str]


def look_up(id: int) -> str:  # noqa: A002 - models are told this name.
    """Look a thing up by its number."""
    return f"thing {id}"


def url(scenario: str, *, version: str = "/v1") -> str:
    """Return the base URL of a scenario's requests."""
    return f"{os.environ['GATEWAY']}/{scenario}{version}"


def key(scenario: str) -> str:
    """Return the key: at the cap, that of a user who has nothing."""
    return POOR_KEY if scenario.startswith("cap") else KEY


def play(**scenarios: Callable[[str], Any]) -> None:
    """Run each scenario, a function of its name, and print what it returns, or how it failed."""
    wanted = os.environ.get("SCENARIOS", "").split()
    for name, scenario in scenarios.items():
        if wanted and name not in wanted:
            continue
        try:
            seen = scenario(name)
            if inspect.isawaitable(seen):
                seen = asyncio.run(_awaited(seen))
        except Exception as exc:  # noqa: BLE001 - how a client fails is what is looked at.
            if os.environ.get("VERBOSE"):
                traceback.print_exc()
            seen = failure(exc)
        sys.stdout.write(json.dumps({"scenario": name, **seen}) + "\n")
        sys.stdout.flush()


def failure(exc: BaseException) -> dict[str, Any]:
    """Return an exception's class, its status, and its message."""
    causes: list[BaseException] = [exc]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 10:
        causes.append(cause)
    status = next((each for exc in causes if (each := getattr(exc, "status_code", None))), None)
    return {"error": type(exc).__name__, "status": status, "message": str(exc)[:500]}


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
