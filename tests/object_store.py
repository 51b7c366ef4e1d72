"""An object store in this process, moto's S3, with faults: answers of its own, lost replies, broken bodies."""

import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tollbook.ledger.archive.s3 import S3Storage, open_s3

KEY: Final = "AKIAKEYOFTHETESTS"
SECRET: Final = "secret/of+the/tests"
_XML: Final = (
    "<?xml version='1.0'?><Error><Code>{code}</Code><Message>in the store's own words: {key}</Message></Error>"
)

Fault = Callable[[str, str], str | None]
"""Returns the fault of a request, by method and path: a status and a code, `lost`, `broken`, or None."""


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...


@dataclass
class ObjectStoreServer:
    """`fault` decides the fault of each request; `requests` has those that came, as `METHOD /path`."""

    fault: Fault = field(default=lambda _method, _path: None)
    requests: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append(f"{method} {path}")
        fault = self.fault(method, path)
        if fault is None:
            return self._app(environ, start_response)
        if fault == "lost":
            # The request is executed, and the reply is lost.
            list(self._app(environ, lambda *_: lambda _: None))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if fault == "broken":
            body = b"".join(self._app(environ, start_response))
            environ["werkzeug.socket"].settimeout(1)
            return [body[: len(body) // 2]]
        status, _, code = fault.partition(" ")
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{status} {code}", [("Content-Type", "application/xml")])
        return [_XML.format(code=code, key=KEY).encode()]


@dataclass
class ObjectStore:
    """A bucket of its own on a server."""

    server: ObjectStoreServer
    bucket: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/books"

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which programs find it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.server.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def storage(self) -> S3Storage:
        return open_s3(self.url)

    def path(self, name: str) -> str:
        """Return the path of an object in requests."""
        return f"/{self.bucket}/books/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write an object past Tollbook, as another program would."""
        self._client.put_object(Bucket=self.bucket, Key=f"books/{name}", Body=content)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=f"books/{name}")

    def get(self, name: str) -> bytes:
        return self._client.get_object(Bucket=self.bucket, Key=f"books/{name}")["Body"].read()

    def names(self) -> list[str]:
        found = self._client.list_objects_v2(Bucket=self.bucket).get("Contents", ())
        return [each["Key"].removeprefix("books/") for each in found]

    @cached_property
    def _client(self) -> Any:
        return self.storage()._client


@contextmanager
def object_store(server: ObjectStoreServer) -> Iterator[ObjectStore]:
    """Yield a new bucket; programs of this process find the server in their environment."""
    store = ObjectStore(server, f"tests-{secrets.token_hex(6)}")
    server.fault, server.requests = lambda _method, _path: None, []
    with patch.dict(os.environ, store.variables):
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
            os.environ.pop(name, None)
        store._client.create_bucket(Bucket=store.bucket)
        yield store
        server.fault = lambda _method, _path: None


def file_with(folder: Path, content: bytes) -> Path:
    path = folder / secrets.token_hex(4)
    path.write_bytes(content)
    return path
