"""Receivers of alerts: a webhook, and the services that Apprise supports (Slack, e-mail and many more).

A receiver takes an alert or says why not. Addresses contain secrets, so no message shows an address (G10).
"""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx
from pydantic import SecretStr

from tollbook.schemas.alerts import Alert
from tollbook.schemas.policy import AlertRule

_WEBHOOK: Final = "webhook"
_APPRISE: Final = "apprise"
_TIMEOUT_S: Final = 10.0
# For the whole delivery. The timeout above starts again with each byte, and a receiver may send single bytes slowly.
_LIMIT_S: Final = 30.0
_MAX_PAUSE_S: Final = 3600.0


class NotDelivered(Exception):
    """A receiver did not take an alert. The text says why; `pause_s` is the pause that it asked for, or None."""

    def __init__(self, why: str, *, pause_s: float | None = None) -> None:
        super().__init__(why)
        self.pause_s = pause_s


class ReceiverProblem(ValueError):
    """A receiver is configured but cannot be used. The text says what to do."""


class Receiver(Protocol):
    """Gets alerts."""

    @property
    def name(self) -> str:
        """Name of the receiver, for commands and metrics."""
        ...

    async def deliver(self, alert: Alert) -> None:
        """Hand over one alert. Errors: NotDelivered."""
        ...


def receivers_of(
    rule: AlertRule, secret: SecretStr | None, read: Callable[[str], str | None], http: httpx.AsyncClient
) -> tuple[list[Receiver], dict[str, str]]:
    """Return the receivers that a policy names, and by name, why the others cannot be used.

    `secret` signs webhooks (TOLLBOOK_WEBHOOK_SECRET); `read` returns an environment variable, or None if it is not set.
    """
    makers: list[tuple[str, str | None, Callable[[str], Receiver]]] = [
        (_WEBHOOK, rule.webhook_env, lambda url: Webhook.of(url, secret, http)),
        (_APPRISE, rule.apprise_env, AppriseReceiver.of),
    ]
    found: list[Receiver] = []
    unusable: dict[str, str] = {}
    for name, variable, make in makers:
        if variable is None:
            continue
        try:
            if (value := read(variable)) is not None:
                found.append(make(value))
            else:
                unusable[name] = f"{variable} is not set; the policy's [alerts] name it"
        except ReceiverProblem as exc:
            unusable[name] = str(exc)
    return found, unusable


def signing_key(secret: SecretStr) -> bytes:
    """Return the key of a Standard Webhooks secret."""
    return base64.b64decode(secret.get_secret_value().removeprefix("whsec_"))


def sign(key: bytes, message_id: str, timestamp_s: int, body: bytes) -> str:
    """Return the `webhook-signature` of a message (https://www.standardwebhooks.com, November 2026)."""
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


@dataclass(frozen=True, slots=True)
class Webhook:
    """A URL that is sent each alert as signed JSON, with the headers of Standard Webhooks."""

    url: SecretStr
    key: bytes
    http: httpx.AsyncClient
    now_s: Callable[[], float] = time.time
    limit_s: float = _LIMIT_S
    name: str = _WEBHOOK

    @classmethod
    def of(cls, url: str, secret: SecretStr | None, http: httpx.AsyncClient) -> "Webhook":
        """Make a webhook. Errors: ReceiverProblem."""
        if secret is None:
            raise ReceiverProblem("TOLLBOOK_WEBHOOK_SECRET is not set: a webhook is signed, so that it can be trusted")
        try:
            is_address = httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
        except httpx.InvalidURL:
            is_address = False
        if not is_address:
            raise ReceiverProblem("the address of the webhook must begin with https:// or http://")
        return cls(SecretStr(url), signing_key(secret), http)

    async def deliver(self, alert: Alert) -> None:
        """Post one alert; any 2xx takes it. Errors: NotDelivered."""
        body = json.dumps(alert.model_dump(mode="json", exclude_none=True), separators=(",", ":")).encode()
        timestamp_s = int(self.now_s())
        headers = {
            "content-type": "application/json",
            "webhook-id": alert.id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": sign(self.key, alert.id, timestamp_s, body),
        }
        request = self.http.build_request(
            "POST", self.url.get_secret_value(), content=body, headers=headers, timeout=_TIMEOUT_S
        )
        try:
            async with asyncio.timeout(self.limit_s):
                reply = await self.http.send(request, stream=True, follow_redirects=False)
                await reply.aclose()  # The body is not read: the status is enough, and a body may be endless.
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as exc:
            raise NotDelivered(f"no answer ({type(exc).__name__})") from None
        if not reply.is_success:
            raise NotDelivered(f"HTTP {reply.status_code}", pause_s=_pause_of(reply))


def _pause_of(reply: httpx.Response) -> float | None:
    """Return how long a receiver asks to wait: its Retry-After in seconds, at most an hour."""
    value = reply.headers.get("retry-after", "")
    return min(float(value), _MAX_PAUSE_S) if value.isdecimal() else None


@dataclass(frozen=True, slots=True)
class AppriseReceiver:
    """Slack, e-mail and the like, by addresses in Apprise's form (https://github.com/caronc/apprise)."""

    apprise: Any
    name: str = _APPRISE

    @classmethod
    def of(cls, addresses: str) -> "AppriseReceiver":
        """Make a receiver from addresses separated by commas or spaces. Errors: ReceiverProblem."""
        try:
            from apprise import Apprise
        except ImportError:
            raise ReceiverProblem('Slack, e-mail and the like need `pip install "tollbook[alerts]"`') from None
        apprise = Apprise()
        if not apprise.add(addresses):  # pyright: ignore[reportUnknownMemberType]
            raise ReceiverProblem("Apprise does not accept an address in the policy's [alerts] apprise_env; correct it")
        return cls(apprise)

    async def deliver(self, alert: Alert) -> None:
        """Send one alert to all addresses. Errors: NotDelivered if one of them did not take it."""
        if not await self.apprise.async_notify(title=f"Tollbook: {alert.kind}", body=alert.text):
            raise NotDelivered("an address did not take it")
