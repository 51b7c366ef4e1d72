"""Texts inside SQL statements, where DuckDB takes no parameter or is slow with one."""


def quoted(text: object) -> str:
    """Return a text, or a path, as it stands in SQL."""
    return "'" + str(text).replace("'", "''") + "'"
