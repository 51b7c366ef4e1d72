"""Clients of the gateways: they ask whole and streamed, leave in the middle, and come again as SDKs do.

Each visit is of a user of its own, so that what it cost can be told apart however many calls were made of it.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tests.chaos.plot import Visit
from tests.chaos.provider import mark

# Longer than killed gateways take to start again on a machine that has much else to do.
_COMES_BACK_FOR_S: Final = 40.0
_MAX_PAUSE_S: Final = 2.0
_PATIENCE_S: Final = 30.0
_FINAL: Final = frozenset({200, 400, 401, 402, 403, 409})


@dataclass(frozen=True, slots=True)
class Answer:
    """What a visit was told in the end: the call's id, the status and the text, or the code of a refusal."""

    visit: Visit
    call_id: str
    status: int
    text: str


@dataclass
class Visitors:
    """The clients of one run. `urls` are the gateways'; `key` lets them name their users."""

    urls: list[str]
    key: str
    answers: list[Answer] = field(default_factory=list[Answer])
    left: int = 0

    async def are_served(self) -> bool:
        """Whether every gateway answers."""
        async with httpx.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
            try:
                return all([(await client.get(f"{url}/openapi.json")).is_success for url in self.urls])
            except httpx.TransportError:
                return False

    async def make(self, visit: Visit) -> None:
        """Ask until there is an answer that no retry changes, or the client is gone for good."""
        async with httpx.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
            until, retries = time.monotonic() + _COMES_BACK_FOR_S, 0
            while time.monotonic() < until:
                url = self.urls[(visit.number + retries) % len(self.urls)]
                patience_s = visit.leaves_after_s if not retries and visit.leaves_after_s else _PATIENCE_S
                try:
                    async with asyncio.timeout(patience_s):
                        answer = await self._ask(client, url, visit, retries)
                except (httpx.TransportError, TimeoutError):
                    answer = None
                    if not visit.comes_back:
                        self.left += 1
                        return
                if answer is not None:
                    self.answers.append(answer)
                    if answer.status in _FINAL:
                        return
                await asyncio.sleep(min(0.2 * 2**retries, _MAX_PAUSE_S))
                retries += 1
        self.left += 1

    async def _ask(self, client: httpx.AsyncClient, url: str, visit: Visit, retries: int) -> Answer:
        headers = {"authorization": f"Bearer {self.key}", "x-tollbook-user": visit.user}
        if visit.campaign:
            headers["x-tollbook-campaign"] = visit.campaign
        # Those who name their call come with the same name again; SDKs only count.
        headers |= {"idempotency-key": visit.user} if visit.has_key else {"x-stainless-retry-count": str(retries)}
        body: dict[str, Any] = {
            "model": visit.model,
            "messages": [{"role": "user", "content": mark(visit.user) + " a post" * visit.length}],
            "stream": visit.is_streamed,
        }
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as reply:
            text = (await reply.aread()).decode()
        call_id = reply.headers.get("x-tollbook-call-id", "")
        if reply.status_code == 200 and visit.is_streamed and not text.rstrip().endswith("data: [DONE]"):
            raise httpx.ReadError("a stream without an end")
        return Answer(visit, call_id, reply.status_code, text)
