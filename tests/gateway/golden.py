"""Golden files of the gateway.

`bodies`: requests as SDKs and agents were seen to send them (November 2026), long texts cut, most tools left out.
`transcripts`: answers and event streams that the SDKs' own types and accumulators were seen to read.
"""

import json
from pathlib import Path
from typing import Any, Final

_GOLDEN: Final = Path(__file__).resolve().parents[1] / "golden" / "gateway"


def names(folder: str, api: str) -> list[str]:
    """Return the names of the files of one API."""
    found = sorted(path.stem for path in (_GOLDEN / folder).glob(f"{api}-*.json"))
    assert found
    return found


def load(folder: str, name: str) -> dict[str, Any]:
    return json.loads((_GOLDEN / folder / f"{name}.json").read_text(encoding="utf-8"))


def events_in(parts: list[bytes]) -> list[dict[str, Any]]:
    """Return the data of events, each of which has its type as its name too."""
    found: list[dict[str, Any]] = []
    for part in parts:
        name, data, *rest = part.decode().split("\n")
        assert rest == ["", ""]
        assert data.startswith("data: ")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found
