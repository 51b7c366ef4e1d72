"""An archive in an object store that speaks S3.

Objects are created with `If-None-Match: *`, so that no object is ever replaced, even if several programs write.
Credentials, region and endpoint come from the usual places of AWS: the environment, `~/.aws`, or the machine's role.
"""

import base64
import contextlib
import errno
import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import create_loader

from tollbook.ledger.archive.s3_address import split_s3_url
from tollbook.ledger.archive.s3_errors import refuse_redirect, status_of, translated
from tollbook.ledger.archive.storage_errors import ArchiveRefused

_T = TypeVar("_T")
_CONNECT_S: Final = 5
_READ_S: Final = 30
_READ: Final = 1 << 20
# Attempts to read an object, each from its beginning, if the connection breaks during the read.
_TRIES: Final = 3
_AT_A_TIME: Final = 8
_EXISTS: Final = 412


def open_s3(url: str) -> "S3Storage":
    """Return the storage at `s3://bucket/prefix`; nothing is sent yet. Errors: ArchiveRefused."""
    try:
        bucket, prefix = split_s3_url(url)
    except ValueError as exc:
        raise ArchiveRefused(f"the address of the object store {exc}") from None
    # At DEBUG they log whole requests, with a session's token (G10).
    for name in ("botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        max_pool_connections=_AT_A_TIME,
        # Three attempts with growing pauses, unless AWS_MAX_ATTEMPTS or the AWS profile says otherwise.
        retries={"mode": "standard"},
        # Content-MD5 and the manifest's SHA-256 protect what is sent and read. By default botocore adds trailing
        # checksums, which not every store knows (botocore 1.36 and later, November 2026).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra="tollbook",
    )
    try:
        session = botocore.session.get_session()
        session.register_component("data_loader", _loader())
        client: Any = session.create_client("s3", config=config)
    except (BotoCoreError, ValueError) as exc:
        raise ArchiveRefused(
            f"the settings of AWS in the environment or in ~/.aws cannot be used ({type(exc).__name__})"
        ) from None
    return S3Storage(client, bucket, prefix)


@cache
def _loader() -> Any:
    """Return the loader of AWS's service descriptions; shared, since a second client then takes a sixth of the time."""
    return create_loader()


class S3Storage:
    """Objects of a bucket whose keys begin with a prefix. Implements `Storage`; safe to use from several threads."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._host = urlsplit(str(client.meta.endpoint_url)).hostname or "the object store"
        client.meta.events.register("needs-retry.s3.HeadBucket", self._refuse_redirect)
        self._lock = threading.Lock()
        # Versions of manifests as listed last, and a cache of their contents; a changed object has a new version.
        self._versions: dict[str, str] = {}
        self._cache: dict[str, tuple[str, bytes]] = {}
        self._is_checked = False

    @property
    def place(self) -> str:
        """As `Storage.place`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def directory(self) -> Path | None:
        """As `Storage.directory`: none."""
        return None

    def located(self, name: str) -> str:
        """As `Storage.located`."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    def names(self, folder: str | None = None) -> list[str]:
        """As `Storage.names`."""
        prefix = f"{self._prefix}{folder}/" if folder else f"{self._prefix}partition-"
        with self._translated(self.place):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            objects = [each for page in pages for each in page.get("Contents", ())]
        found = {each["Key"].removeprefix(self._prefix): each["ETag"] for each in objects}
        found = {name: version for name, version in found.items() if name.count("/") == 1 and "/." not in name}
        with self._lock:
            self._versions |= {name: version for name, version in found.items() if name.endswith(".json")}
        return sorted(found)

    def prefetch(self, names: Sequence[str]) -> None:
        """As `Storage.prefetch`."""
        wanted = [name for name in names if self._cached(name) is None]
        if len(wanted) < 2:
            return

        def fetch(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # The later `read` raises it.
                self.read(name)

        with ThreadPoolExecutor(_AT_A_TIME) as threads:
            list(threads.map(fetch, wanted))

    def read(self, name: str) -> bytes:
        """As `Storage.read`."""
        kept = self._cached(name)
        if kept is not None:
            return kept
        content, version = self._retrying(name, lambda body: body.read())
        if name.endswith(".json"):
            with self._lock:
                self._cache[name] = version, content
        return content

    def size(self, name: str) -> int:
        """As `Storage.size`."""
        with self._translated(self.located(name)):
            return self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)["ContentLength"]

    @contextlib.contextmanager
    def file(self, name: str) -> Generator[Path]:
        """As `Storage.file`: a copy, which is removed after the block."""
        with tempfile.TemporaryDirectory(prefix="tollbook-archive-") as folder:
            yield self._copied(name, Path(folder))

    def files(self, names: Sequence[str]) -> Generator[list[Path]]:
        """As `Storage.files`: copies of a few, which are removed before the next."""
        for start in range(0, len(names), _AT_A_TIME):
            with (
                tempfile.TemporaryDirectory(prefix="tollbook-archive-") as folder,
                ThreadPoolExecutor(_AT_A_TIME) as threads,
            ):
                some = names[start : start + _AT_A_TIME]
                yield list(threads.map(partial(self._copied, folder=Path(folder)), some))

    @contextlib.contextmanager
    def creating(self, name: str) -> Generator[Path]:
        """As `Storage.creating`."""
        with tempfile.TemporaryDirectory(prefix="tollbook-archive-") as folder:
            draft = Path(folder) / Path(name).name
            yield draft
            # One segment, some megabytes.
            self._create(name, draft.read_bytes())

    def check_writing(self, name: str) -> None:
        """As `Storage.check_writing`: the object is created again, which the store must refuse.

        A store without conditional writes would write the same content again.
        """
        with self._lock:
            self._cache.pop(name, None)
        if self._put_new(name, self.read(name)):
            raise ArchiveRefused(
                f"{self.place}: the store replaces objects in spite of If-None-Match, so two projectors could replace "
                "each other's segments: use a store, or a newer release of it, that supports conditional writes"
            )

    def set_aside(self, names: Sequence[str], *, suffix: str) -> str:
        """As `Storage.set_aside`: each object is copied, and then deleted."""
        target = self._prefix.rstrip("/") + suffix
        for name in names:
            key = self._prefix + name
            source = {"Bucket": self._bucket, "Key": key}
            with self._translated(self.located(name)):
                self._client.copy_object(Bucket=self._bucket, Key=f"{target}/{name}", CopySource=source)
                self._client.delete_object(**source)
        return f"s3://{self._bucket}/{target}"

    def replace(self, name: str, file: Path) -> None:
        """As `ObjectStore.replace`."""
        with self._translated(self.located(name)), file.open("rb") as content:
            digest = hashlib.file_digest(content, "md5").digest()
            content.seek(0)
            self._put(name, content, digest)

    def _create(self, name: str, content: bytes) -> None:
        if not self._put_new(name, content) and self._stored(name) != content:  # G7
            raise FileExistsError(errno.EEXIST, "the object has other content", self.located(name))
        if not self._is_checked:
            self.check_writing(name)
            self._is_checked = True

    def _put_new(self, name: str, content: bytes) -> bool:
        """Create an object; return False if an object of this name exists, which may be our own."""
        with self._translated(self.located(name)):
            try:
                self._put(name, content, hashlib.md5(content, usedforsecurity=False).digest(), IfNoneMatch="*")  # G7
            except ClientError as exc:
                if status_of(exc) != _EXISTS:
                    raise
                return False
            return True

    def _put(self, name: str, content: Any, digest: bytes, **condition: str) -> None:
        self._client.put_object(
            Bucket=self._bucket,
            Key=self._prefix + name,
            Body=content,
            # The store compares the digest, and buckets with object lock require it.
            ContentMD5=base64.b64encode(digest).decode(),
            **condition,
        )

    def _stored(self, name: str) -> bytes:
        return self._retrying(name, lambda body: body.read())[0]

    def _cached(self, name: str) -> bytes | None:
        with self._lock:
            version, content = self._cache.get(name, (None, None))
            return content if version is not None and self._versions.get(name) == version else None

    def _copied(self, name: str, folder: Path) -> Path:
        path = folder / name.replace("/", "-")

        def save(body: Any) -> None:
            with path.open("wb") as file:
                while block := body.read(_READ):
                    file.write(block)

        self._retrying(name, save)
        return path

    def _retrying(self, name: str, use: Callable[[Any], _T]) -> tuple[_T, str]:
        """Return the result of `use` for an object's body, and the object's version.

        The library retries requests, but not a body that breaks off: this method retries that.
        """
        for number in range(1, _TRIES + 1):
            with self._translated(self.located(name)):
                reply = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
                try:
                    with contextlib.closing(reply["Body"]) as body:
                        return use(body), reply["ETag"]
                except BotoCoreError:
                    if number == _TRIES:
                        raise
        raise AssertionError("the last try returns or raises")

    def _refuse_redirect(self, response: Any, **_: Any) -> None:
        # Only the library itself sends HeadBucket.
        refuse_redirect(self._host, response)

    def _translated(self, subject: str) -> AbstractContextManager[None]:
        return translated(subject, bucket=self._bucket, host=self._host)
