"""Parts of a Markdown page: what stands between two markers, and tables."""

from collections.abc import Iterable, Sequence


def between(text: str, name: str) -> str:
    """Return what stands between `<!-- name -->` and `<!-- /name -->`, without the empty lines around it.

    Errors: ValueError where the page has no such part.
    """
    return _split(text, name)[1].strip("\n")


def with_part(text: str, name: str, part: str) -> str:
    """Return the page with another part between the markers of this name. Errors: ValueError, as `between`."""
    before, _, after = _split(text, name)
    # Python-Markdown takes a line that directly follows a comment for a part of it.
    return f"{before}\n\n{part}\n\n{after}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a `|` in a cell is escaped."""
    lines = [tuple(head), tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def code(value: str) -> str:
    """Return a value in code letters, or nothing for nothing."""
    return f"`{value}`" if value else ""


def _split(text: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    part, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no part {begin} ... {end}; it begins: {before[:60]!r}")
    return before + begin, part, end + after


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
