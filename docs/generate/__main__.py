"""Write every document that is made from the code: `python -m docs.generate`.

With `--check` nothing is written: the exit code is 1 if a document is not current, and its name is printed.
Works in a checkout of the project.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from docs.generate import asyncapi, commands, event_docs, guarantees, navigation, outcomes, tables


def documents() -> dict[Path, str]:
    """Return every generated document, with its text."""
    generators = (tables, commands, event_docs, asyncapi, guarantees, navigation, outcomes)
    return {path: text for generator in generators for path, text in generator.documents().items()}


def main(arguments: Sequence[str]) -> int:
    """Write the documents, or with `--check` compare them; return the exit code."""
    made = documents()
    old = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in old:
            sys.stderr.write(f"{path} is not current: run python -m docs.generate\n")
        return 1 if old else 0
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
        sys.stderr.write(f"written: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
