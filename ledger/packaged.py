"""Lua and SQL files, shipped beside the modules that run them."""

from functools import cache
from importlib.resources import files


@cache
def packaged_text(package: str, path: str) -> str:
    """Return the text of a file in a package, for example `packaged_text("tollbook.audit", "sql/verify_cap.sql")`."""
    return files(package).joinpath(*path.split("/")).read_text(encoding="utf-8")
