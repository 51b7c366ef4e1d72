"""Paging of long lists of events, the newest first: each page begins where the one before ended."""

import re
from collections.abc import Mapping

from tollbook.views.queries import Place
from tollbook.views.web.parts import Cell, Fact, Part, link
from tollbook.views.web.visit import Visit
from tollbook.views.web.visitors import Refused


def asked_place(visit: Visit) -> Place | None:
    """Return where the page before ended; None for the first page. Errors: Refused."""
    text = visit.asked("before")
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15})\.(\d{1,9})\.(\d{1,18})", text)
    if found is None:
        raise Refused(400, "this address is incomplete: begin with the newest page")
    return int(found[1]), int(found[2]), int(found[3])


def older(path: str, what: str, ended: Place, asked: Mapping[str, str | None]) -> Part:
    """Return the link to the next page, with the same filters."""
    before = ".".join(map(str, ended))
    return [Fact("More", Cell(f"Older {what}", href=link(path, **{**asked, "before": before})))]
