"""One request for a page: the visitor, the query and form values, and the data sources."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tollbook.ledger.signature import Signature
from tollbook.views.web.sources import Sources
from tollbook.views.web.visitors import Refused, Visitor

_MAX_TEXT: Final = 500


@dataclass(frozen=True, slots=True)
class Visit:
    """One request. `query`: values of the address; `form`: values of the sent form."""

    visitor: Visitor
    sources: Sources
    query: Mapping[str, str]
    form: Mapping[str, list[str]]

    def asked(self, name: str) -> str | None:
        """Return a value of the address; None if it is empty."""
        return self.query.get(name, "").strip()[:_MAX_TEXT] or None

    def sent(self, name: str) -> str | None:
        """Return a field of the form; None if it is empty."""
        return self.form.get(name, [""])[0].strip()[:_MAX_TEXT] or None

    def sent_all(self, name: str) -> list[str]:
        """Return all values of a field of the form."""
        return [value for value in self.form.get(name, ()) if value]

    def words(self, name: str) -> list[str]:
        """Return the words of a field, separated by spaces or commas."""
        return (self.sent(name) or "").replace(",", " ").split()

    def sign(self) -> Signature:
        """Return the signature of a change. Its key makes a form that is sent twice idempotent. Errors: Refused."""
        reason = self.sent("reason")
        if reason is None:
            raise Refused(400, "give a reason: it is recorded on the ledger")
        return Signature(self.visitor.author, reason, self.sent("command"))
