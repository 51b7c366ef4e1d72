"""The decisions in the navigation of the site: one line of zensical.toml for each file of docs/adr."""

from pathlib import Path
from typing import Final

CONFIG: Final = Path(__file__).resolve().parents[2] / "zensical.toml"
DECISIONS: Final = Path(__file__).resolve().parents[1] / "adr"
_NAMES: Final = {"duckdb": "DuckDB", "redis": "Redis", "sql": "SQL", "uv": "uv"}
_BEGIN: Final = "      # Made by python -m docs.generate: the files of docs/adr.\n"
_END: Final = "    ] },\n"


def documents() -> dict[Path, str]:
    """Return the configuration of the site, with its text."""
    before, begin, rest = CONFIG.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return {CONFIG: before + begin + decisions() + end + after}


def decisions() -> str:
    """Return a line for each decision, in their order, labelled as its file is named."""
    lines: list[str] = []
    for path in sorted(DECISIONS.glob("[0-9]*.md")):
        number, _, name = path.stem.partition("-")
        first, *others = name.split("-")
        words = [_NAMES.get(first, first.capitalize()), *(_NAMES.get(word, word) for word in others)]
        label = f"{int(number)} {' '.join(words)}"
        lines.append(f'      {{ "{label}" = "adr/{path.name}" }},\n')
    return "".join(lines)
