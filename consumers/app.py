"""The FastStream app: reads the task streams in small batches and hands every entry to the worker.

The worker acknowledges (AckPolicy.MANUAL). Messages are not parsed here, so that a malformed message is dead-lettered
instead of staying pending for ever.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

from faststream import AckPolicy, FastStream
from faststream.redis import RedisBroker, StreamSub
from faststream.redis.configs.state import RedisConnectionState
from faststream.redis.message import FAKE_CONSUMER, RedisBatchStreamMessage

from tollbook.consumers.messages import Delivery, trace_of
from tollbook.consumers.worker import Worker
from tollbook.ledger.keys import GROUP
from tollbook.ledger.server.address import each_server
from tollbook.ledger.server.connection import connect, connection_class, server_url

# Entries are read only as fast as slots get free. In a batch, FastStream's own work is done once for all of them.
_BATCH: Final = 16
_POLL_MS: Final = 500
_STOP_S: Final = 0.5
# FastStream logs every message at debug level, and faults as errors.
_log = logging.getLogger("tollbook.faststream")


def _reword_group_warning(record: logging.LogRecord) -> bool:
    """Replace FastStream's message that a group is gone: it asks for a restart, but the worker creates the group."""
    if "restart the application to recreate the group" in record.getMessage():
        record.msg, record.args, record.exc_info = "a consumer group is gone; the worker creates it again", (), None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _is_no_cancelled_batch(record: logging.LogRecord) -> bool:
    """Whether to log a record: a batch is cancelled when the worker stops, and its waiting tasks stay pending."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _OwnConnection(RedisConnectionState):
    """A connection to a cluster over Tollbook's own client.

    FastStream's `RedisClusterBroker` (0.7.8, read in November 2026) uses redis-py's cluster client, which has a socket
    timeout and retries commands.
    """

    __slots__ = ("_redis_url",)

    def __init__(self, redis_url: str) -> None:
        super().__init__()
        self._redis_url = redis_url

    async def connect(self) -> Any:
        self._client = connect(self._redis_url)
        self._connected = True
        return self._client


class _ClusterBroker(RedisBroker):
    def __init__(self, url: str, **options: Any) -> None:
        self._redis_url = url
        super().__init__(each_server(url)[0], **options)

    def _make_connection_state(self, *_: Any, **__: Any) -> _OwnConnection:
        return _OwnConnection(self._redis_url)


class TaskApp(FastStream):
    """A FastStream app; `ended` is set when the app ends by itself, for example when its consumer group vanishes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ended = asyncio.Event()

    def exit(self) -> None:
        """Called by a subscriber that cannot go on."""
        self.ended.set()


def build_app(
    redis_url: str,
    worker: Worker,
    streams: Iterable[str],
    *,
    middlewares: Sequence[Any] = (),
    reads_traces: bool = False,
    is_cluster: bool = False,
) -> TaskApp:
    """Return the app that feeds `worker`; the consumer groups must exist already, created at id 0.

    With `reads_traces`, middlewares see the publishers' trace contexts in the headers of a batch.
    """
    for log_filter in (_reword_group_warning, _is_no_cancelled_batch):
        _log.addFilter(log_filter)  # Adding the same filter again has no effect.
    # No socket timeout, for the reason in ledger/server/connection.py. The connections leave a demoted server: reading
    # from a group is a write, and FastStream would retry on the same server for ever.
    broker = (_ClusterBroker if is_cluster else RedisBroker)(
        server_url(redis_url),
        apply_types=False,
        logger=_log,
        log_level=logging.DEBUG,
        socket_timeout=None,
        # When reading ends, a batch may still wait for slots; its tasks stay pending.
        graceful_timeout=_STOP_S,
        connection_class=cast("Any", connection_class(redis_url)),
        middlewares=middlewares,
    )
    for stream in streams:
        subscriber = broker.subscriber(
            stream=StreamSub(
                stream, group=GROUP, consumer=worker.name, batch=True, max_records=_BATCH, polling_interval=_POLL_MS
            ),
            ack_policy=AckPolicy.MANUAL,
            parser=_parse_traced if reads_traces else _parse,
            decoder=_decode,
            no_reply=True,
        )
        subscriber(worker.take)
    return TaskApp(broker, logger=None)


async def _parse(message: Any) -> RedisBatchStreamMessage:
    entry_id = message["message_ids"][0].decode()
    return RedisBatchStreamMessage(
        raw_message=message,
        body=b"",
        message_id=entry_id,
        correlation_id=entry_id,
        group=GROUP,
        consumer=FAKE_CONSUMER,  # The worker acknowledges, not FastStream's message.
    )


async def _parse_traced(message: Any) -> RedisBatchStreamMessage:
    parsed = await _parse(message)
    traces = {delivery.entry_id: trace_of(delivery) for delivery in _deliveries(message)}
    # FastStream makes one link per correlation id.
    parsed.batch_headers = [{"correlation_id": entry_id, **trace} for entry_id, trace in traces.items() if trace]
    return parsed


async def _decode(message: Any) -> list[Delivery]:
    return _deliveries(message.raw_message)


def _deliveries(raw: Any) -> list[Delivery]:
    return [
        Delivery(raw["channel"], entry_id.decode(), fields)
        for entry_id, fields in zip(raw["message_ids"], raw["data"], strict=True)
    ]
