"""The FastStream app: reads the task streams in small batches and hands every entry to the worker.

The worker acknowledges (AckPolicy.MANUAL). Messages are taken raw, so that one that cannot be read is dead-lettered
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
# FastStream logs every message at debug level; what goes wrong it logs as an error.
_log = logging.getLogger("tollbook.faststream")


def _says_what_is_true(record: logging.LogRecord) -> bool:
    """Say in our words that a group is gone: FastStream asks for a restart, and the worker makes the group anew."""
    if "restart the application to recreate the group" in record.getMessage():
        record.msg, record.args, record.exc_info = "a consumer group is gone, and is made anew", (), None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _is_not_the_end_of_reading(record: logging.LogRecord) -> bool:
    """Leave out that a batch was cancelled: the worker stops, and what waited for a slot stays pending for others."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _OwnConnection(RedisConnectionState):
    """A connection to a cluster over Tollbook's own client.

    FastStream's `RedisClusterBroker` (0.7.8, read in November 2026) brings redis-py's client of clusters, with a socket
    time-out and commands that are sent again.
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
    """A FastStream app; `ended` is set when it ends by itself, as it does when its consumer group vanishes."""

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
    """Return the app that feeds `worker`; its consumer groups must exist already, made at 0.

    With `reads_traces`, middlewares see the publishers' trace contexts in the headers of a batch.
    """
    for each in (_says_what_is_true, _is_not_the_end_of_reading):
        _log.addFilter(each)  # Once, however often it is added.
    # Without a socket time-out, for the reason that ledger/server/connection.py gives. Its connections leave a server
    # that was demoted: reading from a group writes, and FastStream would try the same one again for ever.
    broker = (_ClusterBroker if is_cluster else RedisBroker)(
        server_url(redis_url),
        apply_types=False,
        logger=_log,
        log_level=logging.DEBUG,
        socket_timeout=None,
        # What a batch still waits for when reading ends are slots; its tasks stay pending.
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
        consumer=FAKE_CONSUMER,  # Acknowledging is not done through FastStream's message.
    )


async def _parse_traced(message: Any) -> RedisBatchStreamMessage:
    parsed = await _parse(message)
    traces = {delivery.entry_id: trace_of(delivery) for delivery in _deliveries(message)}
    # FastStream goes by correlation ids, one link each.
    parsed.batch_headers = [{"correlation_id": entry_id, **trace} for entry_id, trace in traces.items() if trace]
    return parsed


async def _decode(message: Any) -> list[Delivery]:
    return _deliveries(message.raw_message)


def _deliveries(raw: Any) -> list[Delivery]:
    return [
        Delivery(raw["channel"], entry_id.decode(), fields)
        for entry_id, fields in zip(raw["message_ids"], raw["data"], strict=True)
    ]
