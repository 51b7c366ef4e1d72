"""Faults of requests: translating exceptions of httpx and aiohttp into an outcome and a charge.

The question is whether the request may have reached the provider. httpx-aiohttp reports every lost connection as
`httpx.ConnectTimeout`, even if it was lost after the request was sent (0.2.0, November 2026). So aiohttp's exception,
which is its cause, decides. With other transports, httpx's exception decides.
"""

from dataclasses import dataclass
from typing import Final

import aiohttp
import httpx

from tollbook.inference.attempts import ChargeStatus
from tollbook.schemas.events import Outcome

REQUEST_ERRORS: Final = (
    httpx.HTTPError,
    httpx.InvalidURL,
    httpx.StreamError,
    aiohttp.ClientError,
    TimeoutError,
    OSError,
)
"""The exceptions that a request can raise. Any other one is our own bug and is not caught."""

_NOT_CONNECTED: Final = (
    aiohttp.ClientConnectorError,  # Refused, unreachable, name unknown, TLS handshake failed, proxy unreachable.
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    aiohttp.ServerFingerprintMismatch,
    aiohttp.InvalidURL,
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
)
_PERMANENT: Final = (
    aiohttp.ClientConnectorCertificateError,
    aiohttp.InvalidURL,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
)
_TIMED_OUT: Final = (aiohttp.ServerTimeoutError, httpx.TimeoutException, TimeoutError)
_UNREADABLE: Final = (aiohttp.ClientResponseError, httpx.DecodingError)

_REASONS: Final[dict[Outcome, str]] = {
    "not_sent": "no_connection",
    "timeout": "timed_out",
    "invalid_response": "unreadable",
    "connection_error": "connection_lost",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """How a broken request ended, and what it may have cost."""

    outcome: Outcome
    charge: ChargeStatus
    error: str
    is_retryable: bool = True
    may_fall_back: bool = True

    @property
    def reason(self) -> str:
        """The reason of the failure, one of `schemas.failures.FAILURES`."""
        return _REASONS[self.outcome]


def fault_of(exc: BaseException) -> Fault:
    """Translate an exception of httpx, aiohttp or the event loop. The text names its class, never its message (G10)."""
    cause = exc.__cause__ if isinstance(exc.__cause__, aiohttp.ClientError) else exc
    name = type(cause).__name__  # G10
    if isinstance(cause, _NOT_CONNECTED):
        # Another model of the provider has the same address, so a fallback to it would not help.
        return Fault(
            "not_sent",
            "none",
            f"no connection to the provider ({name})",
            is_retryable=not isinstance(cause, _PERMANENT),
            may_fall_back=False,
        )
    if isinstance(cause, _TIMED_OUT):
        return Fault("timeout", "unknown", f"no complete reply in time ({name})")
    if isinstance(cause, _UNREADABLE):
        return Fault("invalid_response", "unknown", f"the reply is not readable HTTP ({name})")
    return Fault("connection_error", "unknown", f"the connection broke ({name})")
