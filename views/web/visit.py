"""One request for a page: who looks, what the address and the form say, and where the data comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tollbook.ledger.signature import Signature
from tollbook.views.web.sources import Sources
from tollbook.views.web.visitors import Refused, Visitor

_MAX_TEXT: Final = 500


@dataclass(frozen=True, slots=True)
class Visit:
    """One request. `query` is of the address, `form` what was sent."""

    visitor: Visitor
    sources: Sources
    query: Mapping[str, str]
    form: Mapping[str, list[str]]

    def asked(self, name: str) -> str | None:
        """Return a value of the address; None where it is empty."""
        return self.query.get(name, "").strip()[:_MAX_TEXT] or None

    def sent(self, name: str) -> str | None:
        """Return a field of the form; None where it is empty."""
        return self.form.get(name, [""])[0].strip()[:_MAX_TEXT] or None

    def sent_all(self, name: str) -> list[str]:
        """Return all values of a field of the form."""
        return [value for value in self.form.get(name, ()) if value]

    def words(self, name: str) -> list[str]:
        """Return a field as the words in it, separated by spaces or commas."""
        return (self.sent(name) or "").replace(",", " ").split()

    def sign(self) -> Signature:
        """Return who changes something, and why, once however often the form is sent. Errors: Refused."""
        reason = self.sent("reason")
        if reason is None:
            raise Refused(400, "say why: it is recorded on the ledger")
        return Signature(self.visitor.author, reason, self.sent("command"))
