"""A gateway over a system in the test's process, with keys that need no ledger."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.calling import Calling, open_calling
from tollbook.gateway.server import Gateway, serve_gateway, settings_of_calls
from tollbook.inference.api_keys import ApiKey
from tollbook.inference.providers.transport import tls_context
from tollbook.inference.runtime import InferenceRuntime, open_runtime
from tollbook.views.web.site import open_site

KEY = "tb-" + "k" * 43
MODEL = "openai/gpt-4o-mini"


def api_key(key_id: str = "key-1", **bounds: Any) -> ApiKey:
    """Make a key for user u1, unless `bounds` say otherwise."""
    usual: dict[str, Any] = {
        "name": None, "user_id": "u1", "plan": None, "campaign_id": None, "tags": {}, "models": (), "streams": (),
        "allows": frozenset(), "is_admin": False, "expires_ms": None,
    }  # fmt: skip
    return ApiKey(**{**usual, "key_id": key_id, **bounds})


class KeysOfTests:
    """Keys by their secrets."""

    def __init__(self) -> None:
        self.by_secret = {KEY: api_key()}

    async def find(self, secret: str) -> ApiKey | None:
        return self.by_secret.get(secret)


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway, a client of it, and the system behind it."""

    calling: Calling
    runtime: InferenceRuntime
    gateway: Gateway
    keys: KeysOfTests
    client: httpx.AsyncClient

    async def chat(
        self, content: str = "Hello", *, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        """Ask for a chat completion."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)


@asynccontextmanager
async def open_served(server_url: str, data_dir: Path, **settings: Any) -> AsyncGenerator[Served]:
    """Serve a gateway of its own runtime, as `tollbook up` does."""
    async with open_calling(server_url, data_dir, **settings) as calling:
        keys = KeysOfTests()
        chosen = settings_of_calls(calling.runtime.settings)
        async with (
            open_runtime(
                chosen,
                calling.runtime.handle,
                lambda names: asyncio.to_thread(calling.store.baselines, names),
                max_call_s=chosen.gateway_timeout_s,
            ) as runtime,
            open_site(runtime) as pages,
            serve_gateway(runtime, port=0, keys=keys, pages=pages) as gateway,
            httpx.AsyncClient(
                base_url=gateway.url,
                headers={"authorization": f"Bearer {KEY}"},
                timeout=30,
                trust_env=False,
                verify=tls_context(),
            ) as client,
        ):
            yield Served(calling, runtime, gateway, keys, client)
