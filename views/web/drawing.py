"""Draws pages with Jinja templates that escape every value, and one stylesheet.

Every text first goes through `printable`, as on a terminal: control characters, and marks that change the direction of
text, are shown and have no effect.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from tollbook.ledger.packaged import packaged_text
from tollbook.views.tables import printable
from tollbook.views.web.parts import Form, Notice, Part, Table

_PACKAGE: Final = "tollbook.views.web"


def draw(template: str, values: Mapping[str, Any]) -> str:
    """Return a page as HTML."""
    return _environment().get_template(template).render(values)


def stylesheet() -> str:
    """Return the stylesheet of all pages."""
    return packaged_text(_PACKAGE, "templates/style.css")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(lambda name: packaged_text(_PACKAGE, f"templates/{name}")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["part"] = _is_a  # pyright: ignore[reportUnknownMemberType] - Jinja names no type of it.
    environment.filters["coded"] = _coded  # pyright: ignore[reportUnknownMemberType] - nor of it.
    return environment


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _coded(text: str) -> Markup:
    """Mark text between backticks, such as a command, as code; sentences of the commands use backticks."""
    parts = [Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in _split(text)]
    return Markup("").join(parts)


def _split(text: str) -> Iterable[tuple[int, str]]:
    parts = printable(text).split("`")
    return enumerate(parts) if len(parts) % 2 else [(0, printable(text))]


def _is_a(part: Part, kind: str) -> bool:
    """Whether a part has this kind, for templates."""
    match part:
        case Table():
            return kind == "table"
        case Form():
            return kind == "form"
        case Notice():
            return kind == "notice"
        case str():
            return kind == "heading"
        case _:
            return kind == "facts"
