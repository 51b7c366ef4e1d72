"""Clients of the gateways: their requests are whole or streamed; they disconnect in the middle, and retry as SDKs do.

Each request has a user of its own, so that its cost is known however many calls were made for it.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tests.chaos.provider import mark
from tests.chaos.scenario import ClientRequest

# Longer than killed gateways take to start again on a busy machine.
_COMES_BACK_FOR_S: Final = 40.0
_MAX_PAUSE_S: Final = 2.0
_PATIENCE_S: Final = 30.0
_FINAL: Final = frozenset({200, 400, 401, 402, 403, 409})


@dataclass(frozen=True, slots=True)
class Answer:
    """The last answer to a client: the call's id, the status and the text, or the code of a refusal."""

    client_request: ClientRequest
    call_id: str
    status: int
    text: str


@dataclass
class Clients:
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

    async def make(self, client_request: ClientRequest) -> None:
        """Send the request until the answer is final or the client is gone for good."""
        async with httpx.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as client:
            until, retries = time.monotonic() + _COMES_BACK_FOR_S, 0
            while time.monotonic() < until:
                url = self.urls[(client_request.number + retries) % len(self.urls)]
                patience_s = (
                    client_request.leaves_after_s if not retries and client_request.leaves_after_s else _PATIENCE_S
                )
                try:
                    async with asyncio.timeout(patience_s):
                        answer = await self._ask(client, url, client_request, retries)
                except (httpx.TransportError, TimeoutError):
                    answer = None
                    if not client_request.comes_back:
                        self.left += 1
                        return
                if answer is not None:
                    self.answers.append(answer)
                    if answer.status in _FINAL:
                        return
                await asyncio.sleep(min(0.2 * 2**retries, _MAX_PAUSE_S))
                retries += 1
        self.left += 1

    async def _ask(self, client: httpx.AsyncClient, url: str, client_request: ClientRequest, retries: int) -> Answer:
        headers = {"authorization": f"Bearer {self.key}", "x-tollbook-user": client_request.user}
        if client_request.campaign:
            headers["x-tollbook-campaign"] = client_request.campaign
        # A client with an Idempotency-Key repeats it; SDKs only count their retries.
        headers |= (
            {"idempotency-key": client_request.user}
            if client_request.has_key
            else {"x-stainless-retry-count": str(retries)}
        )
        body: dict[str, Any] = {
            "model": client_request.model,
            "messages": [{"role": "user", "content": mark(client_request.user) + " a post" * client_request.length}],
            "stream": client_request.is_streamed,
        }
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as reply:
            text = (await reply.aread()).decode()
        call_id = reply.headers.get("x-tollbook-call-id", "")
        if reply.status_code == 200 and client_request.is_streamed and not text.rstrip().endswith("data: [DONE]"):
            raise httpx.ReadError("a stream without an end")
        return Answer(client_request, call_id, reply.status_code, text)
