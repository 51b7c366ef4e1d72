"""Broken requests: can the request have reached the provider? The one question that decides about the money (G3)."""

import ssl
from typing import get_args

import aiohttp
import httpx
import pytest
from aiohttp.client_reqrep import ConnectionKey

from tollbook.inference.providers.faults import REQUEST_ERRORS, Fault, fault_of
from tollbook.inference.providers.transport import BodyTooLarge
from tollbook.schemas.events import FailureReason

SECRET = "Bearer sk-or-v1-very-secret"
KEY = ConnectionKey("provider.test", 443, is_ssl=True, ssl=True, proxy=None, proxy_auth=None, proxy_headers_hash=None)
URL = "http://provider.test"


def caused(cause: Exception, error: Exception | None = None) -> Exception:
    """What the aiohttp transport raises: an error of httpx whose cause is aiohttp's."""
    error = error or httpx.ConnectTimeout(SECRET)
    error.__cause__ = cause
    return error


NEVER_SENT = [
    httpx.ConnectError(SECRET),
    httpx.ConnectTimeout(SECRET),
    httpx.PoolTimeout(SECRET),
    httpx.ProxyError(SECRET),
    caused(aiohttp.ClientConnectorError(KEY, OSError(111, SECRET))),
    caused(aiohttp.ClientConnectorDNSError(KEY, OSError(-2, SECRET))),
    caused(aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(SECRET))),
    caused(aiohttp.ConnectionTimeoutError(SECRET)),
    caused(aiohttp.ConnectionTimeoutError(SECRET), httpx.ReadTimeout(SECRET)),
]
NEVER_SENT_FOR_GOOD = [
    httpx.UnsupportedProtocol(SECRET),
    httpx.InvalidURL(SECRET),
    caused(aiohttp.InvalidURL(URL)),
    caused(aiohttp.ClientConnectorCertificateError(KEY, ssl.CertificateError(SECRET))),
]
TIMED_OUT = [
    httpx.ReadTimeout(SECRET),
    httpx.WriteTimeout(SECRET),
    TimeoutError(SECRET),
    caused(aiohttp.SocketTimeoutError(SECRET)),
    caused(aiohttp.ServerTimeoutError(SECRET)),
]
BROKEN = [
    httpx.ReadError(SECRET),
    httpx.WriteError(SECRET),
    httpx.RemoteProtocolError(SECRET),
    httpx.StreamClosed(),
    ConnectionResetError(SECRET),
    BrokenPipeError(SECRET),
    OSError(SECRET),
    # The name says that no connection was made; the cause, that it was lost afterwards.
    caused(aiohttp.ServerDisconnectedError(SECRET)),
    caused(aiohttp.ClientOSError(104, SECRET)),
    caused(aiohttp.ClientPayloadError(SECRET)),
]
UNREADABLE = [
    httpx.DecodingError(SECRET),
    BodyTooLarge(SECRET),
]
ALL = [*NEVER_SENT, *NEVER_SENT_FOR_GOOD, *TIMED_OUT, *BROKEN, *UNREADABLE]


def names(errors: list[Exception]) -> list[str]:
    return [f"{type(each).__name__}-{type(each.__cause__).__name__ if each.__cause__ else ''}" for each in errors]


@pytest.mark.parametrize("error", NEVER_SENT, ids=names(NEVER_SENT))
def test_request_that_was_never_sent_costs_nothing_and_may_be_tried_again(error: Exception) -> None:
    fault = fault_of(error)
    assert (fault.outcome, fault.charge, fault.is_retryable) == ("not_sent", "none", True)
    # Another model is behind the same door.
    assert not fault.may_fall_back


@pytest.mark.parametrize("error", NEVER_SENT_FOR_GOOD, ids=names(NEVER_SENT_FOR_GOOD))
def test_request_that_can_never_be_sent_is_not_tried_again(error: Exception) -> None:
    fault = fault_of(error)
    assert (fault.outcome, fault.charge) == ("not_sent", "none")
    assert not fault.is_retryable
    assert not fault.may_fall_back


@pytest.mark.parametrize("error", TIMED_OUT, ids=names(TIMED_OUT))
def test_request_that_timed_out_may_have_been_charged(error: Exception) -> None:
    assert (fault_of(error).outcome, fault_of(error).charge) == ("timeout", "unknown")


@pytest.mark.parametrize("error", BROKEN, ids=names(BROKEN))
def test_connection_that_broke_may_have_been_charged(error: Exception) -> None:
    assert (fault_of(error).outcome, fault_of(error).charge) == ("connection_error", "unknown")


@pytest.mark.parametrize("error", UNREADABLE, ids=names(UNREADABLE))
def test_reply_that_cannot_be_read_may_have_been_charged(error: Exception) -> None:
    assert (fault_of(error).outcome, fault_of(error).charge) == ("invalid_response", "unknown")


@pytest.mark.parametrize("error", ALL, ids=names(ALL))
def test_error_is_caught_named_and_never_quoted(error: Exception) -> None:
    assert isinstance(error, REQUEST_ERRORS)
    fault = fault_of(error)
    cause = error.__cause__ or error
    assert f"({type(cause).__name__})" in fault.error
    # G10: an error's own text may hold an address with a key in it.
    assert "secret" not in repr(fault)
    # Every outcome can be the reason of a fallback on the ledger.
    assert fault.outcome in get_args(FailureReason)


def test_cause_that_is_not_of_aiohttp_does_not_decide() -> None:
    assert fault_of(caused(ZeroDivisionError(), httpx.ConnectError("x"))).outcome == "not_sent"
    assert fault_of(caused(ConnectionResetError(), httpx.ReadError("x"))).outcome == "connection_error"


@pytest.mark.parametrize("error", [ValueError(), KeyError(), ZeroDivisionError(), AssertionError()])
def test_errors_of_our_own_code_are_not_caught(error: Exception) -> None:
    assert not isinstance(error, REQUEST_ERRORS)


def test_fault_can_be_tried_again_unless_it_says_otherwise() -> None:
    assert Fault("timeout", "unknown", "x") == Fault("timeout", "unknown", "x", is_retryable=True, may_fall_back=True)
