"""Translates the errors of an object store into the errors of a storage.

No message quotes the store or the library, since their texts may hold an address with a password or a part of a key
(G10): messages have only the plain error code, the status, and the name of the library's error.
"""

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from tollbook.ledger.archive.storage_errors import ArchiveRefused, ArchiveUnavailable

_MISSING: Final = frozenset({"NoSuchKey", "NotFound", "404"})
_DENIED: Final = frozenset({401, 403})
_ELSEWHERE: Final = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_WAIT: Final = frozenset({408, 409, 429})
_NOT_IMPLEMENTED: Final = 501
_REDIRECTS: Final = frozenset({301, 302, 307, 308})
_ADVICE: Final = {
    "RequestTimeTooSkewed": "this machine's clock is not the store's: set it right",
    "ExpiredToken": "the session has ended: get new credentials",
}
"""What to do, for codes that say more than that access is denied."""


@contextmanager
def translated(subject: str, *, bucket: str, host: str) -> Generator[None]:
    """Translate the errors of the block. Errors: FileNotFoundError; ArchiveRefused; ArchiveUnavailable."""
    try:
        yield
    except ClientError as exc:
        raise _answered(subject, bucket, host, exc) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise ArchiveRefused(
            f"{subject}: no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or give this machine a role"
        ) from None
    except BotoCoreError as exc:
        raise ArchiveUnavailable(f"{subject}: {host} did not answer ({type(exc).__name__})") from None


def refuse_redirect(host: str, response: Any) -> None:
    """Refuse a redirect that names no region, such as that of a proxy which requires TLS.

    After a redirect, the library asks for the bucket's region. If the answer is again a redirect without a region, it
    asks for ever (botocore 1.44, November 2026). Errors: ArchiveRefused.
    """
    if response is None or response[0].status_code not in _REDIRECTS:
        return
    if "x-amz-bucket-region" not in response[1]["ResponseMetadata"]["HTTPHeaders"]:
        raise _redirected(host, response[0].status_code)


def status_of(exc: ClientError) -> int:
    """Return the HTTP status of an error reply."""
    metadata: Any = exc.response.get("ResponseMetadata", {})
    return int(metadata.get("HTTPStatusCode", 0))


def _answered(subject: str, bucket: str, host: str, exc: ClientError) -> Exception:
    status, code = status_of(exc), _code_of(exc)
    if code == "NoSuchBucket":
        return ArchiveRefused(f"there is no bucket {bucket} at {host}: correct the address, or create the bucket")
    if code in _MISSING or status == 404:
        return FileNotFoundError(errno.ENOENT, "there is no such object", subject)
    if status in _DENIED:
        return ArchiveRefused(
            f"{subject}: access is denied ({code}): "
            + _ADVICE.get(
                code, "check the credentials, and that they may list, get and put there, for `recover` also delete"
            )
        )
    if code in _ELSEWHERE or status in (301, 307):
        return ArchiveRefused(f"the bucket {bucket} is in another region: set AWS_REGION to its region")
    if status in _REDIRECTS:
        return _redirected(host, status)
    if status == _NOT_IMPLEMENTED:
        return ArchiveRefused(f"{subject}: {host} does not support the request ({code})")
    if status >= 500 or status in _WAIT or code == "RequestTimeout":
        return ArchiveUnavailable(f"{subject}: {host} cannot serve now ({code}, status {status})")
    advice = f": {_ADVICE[code]}" if code in _ADVICE else ""
    return ArchiveRefused(f"{subject}: {host} refuses the request ({code}, status {status}){advice}")


def _redirected(host: str, status: int) -> ArchiveRefused:
    return ArchiveRefused(
        f"{host} sends requests to another address (status {status}): set AWS_ENDPOINT_URL to the address of the "
        "object store itself, with https:// if it requires TLS"
    )


def _code_of(exc: ClientError) -> str:
    error: Any = exc.response.get("Error", {})
    code = str(error.get("Code", ""))
    return code if re.fullmatch(r"[A-Za-z0-9]{1,60}", code) else "no code"
