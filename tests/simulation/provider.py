"""The provider: a transport for httpx with faults and a book of what it charged.

It keeps the promises of a provider like OpenRouter: an explicit error is free, everything else may
be charged, and nothing costs more than the bound. A request is charged even if nobody waits for
the reply any more.
"""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any, Final

import httpx

from tests.simulation.loop import Process, VirtualLoop, current_process
from tollbook.inference.bounds import TOKENS_PER_MESSAGE, TOKENS_PER_REQUEST
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, price_from_usd
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.usage import Usage

LARGE: Final = "sim/large"
SMALL: Final = "sim/small"
PRICES: Final = PriceCatalogue(
    {
        LARGE: [DatedPrice(FOREVER_MS, price_from_usd(LARGE, prompt=Decimal(3), completion=Decimal(15)))],
        SMALL: [DatedPrice(FOREVER_MS, price_from_usd(SMALL, prompt=Decimal(1), completion=Decimal(5)))],
    }
)


@dataclass
class Request:
    """One line of the book. `charge_nanousd` is None until it is decided; `is_answered` once its sender has a reply."""

    number: int
    call_id: str
    model: str
    process: Process
    started_s: float
    charge_nanousd: int | None = None
    is_answered: bool = False


@dataclass
class ProviderFaults:
    """How often requests fail, as shares of requests."""

    refused: float = 0.0
    failed_free: float = 0.0
    lost: float = 0.0
    unreachable: float = 0.0
    never: float = 0.0
    late: float = 0.0


class Provider:
    """Answers requests of all processes. `on_request` is called for each as it comes in."""

    def __init__(self, loop: VirtualLoop, random: Random, faults: ProviderFaults, *, timeout_s: float) -> None:
        self.loop = loop
        self.random = random
        self.faults = faults
        self.timeout_s = timeout_s
        self.book: list[Request] = []
        self.on_request: Callable[[Request], None] = lambda *_: None

    def transport(self) -> "Transport":
        return Transport(self)

    @property
    def under_way(self) -> int:
        """Number of requests whose cost is not decided yet."""
        return sum(request.charge_nanousd is None for request in self.book)

    def take(self, document: dict[str, Any]) -> "asyncio.Future[httpx.Response]":
        """Take a request; the future gets the reply or the connection's error, or is never done."""
        random, faults = self.random, self.faults
        reply: asyncio.Future[httpx.Response] = self.loop.create_future()
        kinds = ("refused", "failed_free", "lost", "unreachable", "never", "late")
        shares = [getattr(faults, kind) for kind in kinds]
        kind = random.choices((*kinds, "ok"), (*shares, max(0.0, 1.0 - sum(shares))))[0]
        latency_s = random.uniform(0.05, 0.9 * self.timeout_s)
        if kind == "unreachable":
            self.loop.world_later(0.01, _fail, reply, httpx.ConnectError("refused"))
            return reply
        words = document["messages"][-1]["content"]
        found = re.match(r"\[(\S+)\]", words)
        assert found is not None
        request = Request(len(self.book), found[1], document["model"], current_process(), self.loop.time())
        self.book.append(request)
        self.on_request(request)
        usage = self._usage(document, words)
        cost = PRICES.cost(request.model, usage, 0)
        match kind:
            case "refused":
                self.loop.world_later(latency_s, self._finish, request, 0, reply, self._refusal())
            case "failed_free":
                failure = httpx.Response(200, json={"error": {"code": 502, "message": "upstream"}})
                self.loop.world_later(latency_s, self._finish, request, 0, reply, failure)
            case "lost":
                charged = random.choice((0, cost, cost))
                self.loop.world_later(latency_s, self._finish, request, charged, reply, httpx.ReadError("lost"))
            case "never":
                charged_at_s = random.uniform(0.0, 3 * self.timeout_s)
                self.loop.world_later(charged_at_s, self._finish, request, random.choice((0, cost)), None, None)
            case "late":
                latency_s = self.timeout_s * random.uniform(0.98, 1.3)
                self.loop.world_later(latency_s, self._finish, request, cost, reply, self._answer(request, usage, cost))
            case _:
                self.loop.world_later(latency_s, self._finish, request, cost, reply, self._answer(request, usage, cost))
        return reply

    def _usage(self, document: dict[str, Any], words: str) -> Usage:
        """Draw a usage within the bound, quite often exactly at the bound."""
        most_prompt = TOKENS_PER_REQUEST + TOKENS_PER_MESSAGE + len(words)
        if self.random.random() < 0.2:
            return Usage(prompt_tokens=most_prompt, completion_tokens=document["max_tokens"])
        return Usage(
            prompt_tokens=self.random.randint(1, most_prompt),
            completion_tokens=self.random.randint(1, document["max_tokens"]),
        )

    def _refusal(self) -> httpx.Response:
        status = self.random.choice((400, 429, 429, 503))
        headers = {"retry-after": str(self.random.randint(0, 3))} if self.random.random() < 0.3 else {}
        return httpx.Response(status, headers=headers, json={"error": {"code": status, "message": "no"}})

    def _answer(self, request: Request, usage: Usage, cost: int) -> httpx.Response:
        counts: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        if self.random.random() < 0.7:
            counts["cost"] = "COST"
        document = {
            "id": f"gen-{request.number}",
            "model": request.model,
            "choices": [{"message": {"content": f"answer {request.number}"}, "finish_reason": "stop"}],
            "usage": counts,
        }
        text = json.dumps(document).replace('"COST"', f"{usd_from_nanousd(cost):f}")
        return httpx.Response(200, text=text)

    def _finish(
        self,
        request: Request,
        charge_nanousd: int,
        reply: "asyncio.Future[httpx.Response] | None",
        outcome: httpx.Response | Exception | None,
    ) -> None:
        request.charge_nanousd = charge_nanousd
        if reply is None or reply.done() or outcome is None:
            return
        if isinstance(outcome, Exception):
            reply.set_exception(outcome)
        else:
            request.is_answered = True
            reply.set_result(outcome)


def _fail(reply: "asyncio.Future[httpx.Response]", problem: Exception) -> None:
    if not reply.done():
        reply.set_exception(problem)


class Transport(httpx.AsyncBaseTransport):
    """The httpx transport of a process."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._provider.loop.is_ending:
            raise asyncio.CancelledError
        return await self._provider.take(json.loads(request.content))
