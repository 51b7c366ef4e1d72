"""Receiving a reply: its body is read piece by piece, its id is reported early, its deltas are passed on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tollbook.inference.deltas import Delta, OnDelta, pass_on
from tollbook.inference.providers.bodies import Body

FindId = Callable[[Mapping[str, str], object], str | None]
"""Returns the id of a request, from the headers and the id in a stream; None if it is not known yet."""
_NO_HEADERS: Final[Mapping[str, str]] = {}


class Receiver:
    """Receives one reply.

    `on_id` is called once, with the id that `find_id` finds; `on_delta` is awaited for each delta.
    Errors: ReaderFailed if `on_delta` raises.
    """

    def __init__(
        self,
        *,
        find_id: FindId | None = None,
        on_id: Callable[[str], None] | None = None,
        on_delta: OnDelta | None = None,
    ) -> None:
        self.body = Body()
        self._find_id = find_id
        self._on_id = on_id
        self._on_delta = on_delta
        self._headers = _NO_HEADERS
        self._is_success = False

    def begin(self, headers: Mapping[str, str]) -> None:
        """Add the headers of a reply that is no error."""
        self._is_success = True
        self._headers = headers
        self._look_for_id()

    async def take(self, piece: bytes) -> None:
        """Add some bytes of the body."""
        deltas = self.body.feed(piece)
        if self._find_id is not None:
            self._look_for_id()
        if deltas:
            await self._pass_on(deltas)

    async def end(self, *, is_broken: bool = False) -> None:
        """Read the body to its end; `is_broken`: the connection broke off."""
        await self._pass_on(self.body.end(is_broken=is_broken))

    def _look_for_id(self) -> None:
        if self._find_id is None or self._on_id is None or not self._is_success:
            return
        found = self._find_id(self._headers, self.body.id)
        if found is not None:
            self._find_id = None
            self._on_id(found)

    async def _pass_on(self, deltas: Sequence[Delta]) -> None:
        """Pass deltas on, if there is a reader."""
        if self._on_delta is None or not self._is_success:
            return
        for delta in deltas:
            await pass_on(delta, self._on_delta)
