"""Texts inside SQL statements, for places where DuckDB accepts no parameter or is slow with it."""


def quoted(text: object) -> str:
    """Return a text, or a path, as an SQL string literal."""
    return "'" + str(text).replace("'", "''") + "'"
