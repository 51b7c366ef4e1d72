"""A Redis server in memory that runs the project's own Lua, with the simulation's clock.

It has only the commands that the Lua, the workers and the simulation use, over plain dictionaries;
test_fake_redis.py compares them with a real server. Callbacks see its commands and its new stream
entries.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import lupa.lua51
from redis.exceptions import ResponseError

Clock = Callable[[], float]
Id = tuple[int, int]

# The environment that Redis gives to a library. A raised table {err=...} becomes an error reply.
_PRELUDE = b"""
local functions, run = {}, ...
cjson = { encode = run.encode }
redis = {
  call = function(...)
    local reply = run.call(...)
    if reply == nil then return false end
    return reply
  end,
  pcall = function(...)
    local ok, reply = pcall(run.call, ...)
    if not ok then return { err = tostring(reply) } end
    if reply == nil then return false end
    return reply
  end,
  register_function = function(name, callback)
    if type(name) == 'table' then
      functions[name.function_name] = name.callback
    else
      functions[name] = callback
    end
  end,
}
return function(name, keys, args)
  local callback = functions[name]
  if not callback then return 'missing', '' end
  local ok, reply = pcall(callback, keys, args)
  if ok then return 'ok', reply end
  if type(reply) == 'table' then return 'error', reply.err end
  return 'error', tostring(reply)
end
"""


class Library:
    """A function library, compiled once; it works on the server that calls it."""

    def __init__(self, code: str) -> None:
        runtime: Any = lupa.lua51.LuaRuntime  # Its types do not know its options.
        self._lua: Any = runtime(encoding=None, unpack_returned_tuples=True)
        self._server: RedisServer | None = None
        self._problem: Exception | None = None
        tools = self._lua.table_from({b"call": self._call, b"encode": _encode})
        self._run = self._lua.execute(_PRELUDE, tools)
        _, _, body = code.partition("\n")  # Without the line that names the library.
        self._lua.execute(body.encode())

    def run(self, server: "RedisServer", name: bytes, keys: Sequence[bytes], arguments: Sequence[bytes]) -> Any:
        self._server, self._problem = server, None
        table = self._lua.table_from
        outcome, *reply = self._run(name, table(keys), table(arguments))
        if self._problem is not None:
            raise self._problem  # An error of a callback, which Lua's pcall has swallowed.
        match outcome:
            case b"missing":
                raise ResponseError("Function not found")
            case b"error":
                raise ResponseError(reply[0].decode())
            case _:
                return self._from_lua(reply[0])

    def _call(self, *command: Any) -> Any:
        assert self._server is not None
        try:
            return self._to_lua(self._server.call([_bytes(part) for part in command]))
        except Exception as exc:
            self._problem = exc
            raise

    def _to_lua(self, reply: Any) -> Any:
        if isinstance(reply, list):
            # None becomes false, as in Redis.
            return self._lua.table_from([False if part is None else self._to_lua(part) for part in cast("Any", reply)])
        return reply

    def _from_lua(self, reply: Any) -> Any:
        if isinstance(reply, bytes | int | None):
            return reply
        return [self._from_lua(reply[i]) for i in range(1, len(reply) + 1)]


@cache
def library(code: str) -> Library:
    """Compile a library once for all simulations."""
    return Library(code)


def _encode(text: bytes) -> bytes:
    assert text.isascii()
    return b'"' + text.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"/", b"\\/") + b'"'


def _bytes(part: Any) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, str):
        return part.encode()
    assert not isinstance(part, float) or part.is_integer()
    return b"%d" % int(part)


@dataclass(slots=True)
class Claim:
    """One pending entry of a consumer group."""

    consumer: bytes
    delivered_ms: int
    count: int


@dataclass(slots=True)
class Group:
    """A consumer group. `seen_ms` is when each consumer last asked for something."""

    last: Id = (0, 0)
    pending: dict[Id, Claim] = field(default_factory=dict[Id, Claim])
    seen_ms: dict[bytes, int] = field(default_factory=dict[bytes, int])


@dataclass(slots=True)
class Stream:
    """A stream and its groups."""

    entries: dict[Id, list[bytes]] = field(default_factory=dict[Id, list[bytes]])
    last: Id = (0, 0)
    groups: dict[bytes, Group] = field(default_factory=dict[bytes, Group])


@dataclass(frozen=True)
class Backup:
    """The keys of a moment, with the times at which they expire."""

    values: dict[bytes, Any]
    expires: dict[bytes, float]


class RedisServer:
    """Keys and the commands on them.

    `on_add(stream, entry_id, fields)` is called for every appended entry, `on_set(key, value)` for every string that is
    set; `on_publish(channel, message)` delivers. `client` is the process whose command is executed.
    """

    def __init__(self, clock: Clock, code: str) -> None:
        self._clock = clock
        self._library = library(code)
        self._code = code
        self._values: dict[bytes, Any] = {}
        self._expires: dict[bytes, float] = {}
        self.client: object = None
        self.on_add: Callable[[bytes, Id, list[bytes]], None] = lambda *_: None
        self.on_set: Callable[[bytes, bytes], None] = lambda *_: None
        self.on_publish: Callable[[bytes, bytes], int] = lambda *_: 0

    def execute(self, command: Sequence[Any]) -> Any:
        """Run one command as from a connection. Errors: ResponseError."""
        return self.call([_bytes(part) for part in command])

    def call(self, command: list[bytes]) -> Any:
        handler = getattr(self, "_" + command[0].decode().lower())
        return handler(*command[1:])

    def backup(self) -> "Backup":
        """Return a copy of all keys."""
        return Backup(deepcopy(self._values), dict(self._expires))

    def put_back(self, backup: "Backup", *, is_another_server: bool) -> None:
        """Restore a backup. Another server, such as a promoted replica, has a newly loaded library without memory."""
        self._values, self._expires = deepcopy(backup.values), dict(backup.expires)
        if is_another_server:
            self._library = Library(self._code)

    def names(self) -> list[bytes]:
        """All keys there are."""
        return [key for key in list(self._values) if self._get_value(key) is not None]

    def stream(self, key: bytes) -> Stream:
        """A stream, made if it is not there."""
        value = self._get_value(key)
        if value is None:
            value = self._values[key] = Stream()
        assert isinstance(value, Stream)
        return value

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _get_value(self, key: bytes) -> Any:
        at_s = self._expires.get(key)
        if at_s is not None and at_s <= self._clock():
            self._delete(key)
        return self._values.get(key)

    def _delete(self, key: bytes) -> int:
        self._expires.pop(key, None)
        return int(self._values.pop(key, None) is not None)

    # --- Functions and keys ---

    def _fcall(self, name: bytes, count: bytes, *rest: bytes) -> Any:
        keys, arguments = rest[: int(count)], rest[int(count) :]
        return self._library.run(self, name, keys, arguments)

    def _time(self) -> list[bytes]:
        micros = int(self._clock() * 1_000_000)
        return [b"%d" % (micros // 1_000_000), b"%d" % (micros % 1_000_000)]

    def _exists(self, *keys: bytes) -> int:
        return sum(self._get_value(key) is not None for key in keys)

    def _del(self, *keys: bytes) -> int:
        return sum(self._delete(key) for key in keys)

    def _get(self, key: bytes) -> bytes | None:
        return self._get_value(key)

    def _set(self, key: bytes, value: bytes, *options: bytes) -> bytes | None:
        words = [option.upper() for option in options]
        if b"NX" in words and self._get_value(key) is not None:
            return None
        self._expires.pop(key, None)
        for unit, seconds in ((b"EX", 1.0), (b"PX", 0.001)):
            if unit in words:
                self._expires[key] = self._clock() + int(words[words.index(unit) + 1]) * seconds
        self._values[key] = value
        self.on_set(key, value)
        return b"OK"

    def _incrby(self, key: bytes, number: bytes) -> int:
        value = int(self._get_value(key) or 0) + int(number)
        self._values[key] = b"%d" % value
        return value

    def _publish(self, channel: bytes, message: bytes) -> int:
        return self.on_publish(channel, message)

    # --- Hashes, sorted sets, lists ---

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        return self._get_value(key) or {}

    def _hget(self, key: bytes, name: bytes) -> bytes | None:
        return self._hash(key).get(name)

    def _hmget(self, key: bytes, *names: bytes) -> list[bytes | None]:
        values = self._hash(key)
        return [values.get(name) for name in names]

    def _hgetall(self, key: bytes) -> list[bytes]:
        return [part for pair in self._hash(key).items() for part in pair]

    def _hset(self, key: bytes, *pairs: bytes) -> int:
        values = self._values.setdefault(key, {})
        before = len(values)
        values.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(values) - before

    def _hdel(self, key: bytes, *names: bytes) -> int:
        values = self._hash(key)
        gone = sum(values.pop(name, None) is not None for name in names)
        if gone and not values:
            self._delete(key)
        return gone

    def _zadd(self, key: bytes, score: bytes, member: bytes) -> int:
        scores = self._values.setdefault(key, {})
        is_new = member not in scores
        scores[member] = float(score)
        return int(is_new)

    def _zrem(self, key: bytes, member: bytes) -> int:
        return self._hdel(key, member)

    def _zrangebyscore(self, key: bytes, low: bytes, high: bytes, *limit: bytes) -> list[bytes]:
        assert low == b"-inf"
        assert high.startswith(b"(")
        found = sorted((score, member) for member, score in self._hash(key).items() if score < float(high[1:]))  # pyright: ignore[reportOperatorIssue]
        members = [member for _, member in found]
        return members[int(limit[1]) :][: int(limit[2])] if limit else members

    def _list(self, key: bytes) -> list[bytes]:
        return self._get_value(key) or []

    def _rpush(self, key: bytes, *items: bytes) -> int:
        values = self._values.setdefault(key, [])
        values.extend(items)
        return len(values)

    def _lpop(self, key: bytes) -> bytes | None:
        values = self._list(key)
        if not values:
            return None
        item = values.pop(0)
        if not values:
            self._delete(key)
        return item

    def _lindex(self, key: bytes, index: bytes) -> bytes | None:
        values, place = self._list(key), int(index)
        return values[place] if -len(values) <= place < len(values) else None

    def _llen(self, key: bytes) -> int:
        return len(self._list(key))

    def _lrange(self, key: bytes, start: bytes, stop: bytes) -> list[bytes]:
        assert (start, stop) == (b"0", b"-1")
        return list(self._list(key))

    # --- Streams ---

    def _xadd(self, key: bytes, entry_id: bytes, *fields: bytes) -> bytes:
        assert entry_id == b"*"
        stream = self.stream(key)
        now_ms, (last_ms, last_n) = self._now_ms(), stream.last
        new = (now_ms, 0) if now_ms > last_ms else (last_ms, last_n + 1)
        stream.last = new
        stream.entries[new] = list(fields)
        self.on_add(key, new, list(fields))
        return _text(new)

    def _xtrim(self, key: bytes, strategy: bytes, threshold: bytes) -> int:
        entries = self.stream(key).entries if self._get_value(key) is not None else {}
        low = _id(threshold + b"-0") if strategy == b"MINID" else (0, 0)
        surplus = len(entries) - int(threshold) if strategy == b"MAXLEN" else 0
        gone = [entry_id for place, entry_id in enumerate(entries) if place < surplus or entry_id < low]
        for entry_id in gone:
            del entries[entry_id]
        return len(gone)

    def _xlen(self, key: bytes) -> int:
        value = self._get_value(key)
        return len(value.entries) if value else 0

    def _xrange(self, key: bytes, low: bytes = b"-", high: bytes = b"+", *count: bytes) -> list[Any]:
        value = self._get_value(key)
        entries = [[_text(entry_id), list(fields)] for entry_id, fields in value.entries.items()] if value else []
        if (low, high, count) == (b"-", b"+", ()):
            return entries
        assert low == high, "a range is all entries, or one"
        return [entry for entry in entries if entry[0] == low]

    def _xrevrange(self, key: bytes, high: bytes, low: bytes, *count: bytes) -> list[Any]:
        assert (high, low) == (b"+", b"-")
        entries = self._xrange(key)[::-1]
        return entries[: int(count[1])] if count else entries

    def _xgroup(self, verb: bytes, key: bytes, name: bytes, *rest: bytes) -> bytes | int:
        if verb.upper() == b"DELCONSUMER":
            return self._delete_consumer(key, name, *rest)
        assert verb.upper() == b"CREATE"
        groups = self.stream(key).groups
        if name in groups:
            raise ResponseError("BUSYGROUP Consumer Group name already exists")
        groups[name] = Group()
        return b"OK"

    def _delete_consumer(self, key: bytes, name: bytes, consumer: bytes) -> int:
        _, group = self._group(key, name)
        owned = [entry_id for entry_id, claim in group.pending.items() if claim.consumer == consumer]
        for entry_id in owned:
            del group.pending[entry_id]
        group.seen_ms.pop(consumer, None)
        return len(owned)

    def _xinfo(self, verb: bytes, key: bytes, name: bytes) -> list[Any]:
        assert verb.upper() == b"CONSUMERS"
        _, group = self._group(key, name)
        owners = [claim.consumer for claim in group.pending.values()]
        now_ms = self._now_ms()
        return [
            [b"name", consumer, b"pending", owners.count(consumer), b"idle", now_ms - seen_ms]
            for consumer, seen_ms in sorted(group.seen_ms.items())
        ]

    def _group(self, key: bytes, name: bytes) -> tuple[Stream, Group]:
        stream = self._get_value(key)
        if stream is None or name not in stream.groups:
            raise ResponseError(f"NOGROUP No such key '{key.decode()}' or consumer group '{name.decode()}'")
        return stream, stream.groups[name]

    def _xreadgroup(self, *words: bytes) -> list[Any] | None:
        """XREADGROUP GROUP group consumer COUNT n STREAMS key >; never blocks."""
        group_word, name, consumer, count_word, count, streams_word, key, newest = words
        assert (group_word, count_word, streams_word, newest) == (b"GROUP", b"COUNT", b"STREAMS", b">")
        stream, group = self._group(key, name)
        group.seen_ms[consumer] = self._now_ms()
        fresh = [entry_id for entry_id in stream.entries if entry_id > group.last][: int(count)]
        if not fresh:
            return None
        for entry_id in fresh:
            group.pending[entry_id] = Claim(consumer, self._now_ms(), 1)
        group.last = fresh[-1]
        return [[key, [[_text(entry_id), list(stream.entries[entry_id])] for entry_id in fresh]]]

    def _xack(self, key: bytes, name: bytes, *ids: bytes) -> int:
        _, group = self._group(key, name)
        return sum(group.pending.pop(_id(entry_id), None) is not None for entry_id in ids)

    def _xpending(self, key: bytes, name: bytes, *words: bytes) -> list[Any]:
        _, group = self._group(key, name)
        idle_ms = 0
        if words[0].upper() == b"IDLE":
            idle_ms, words = int(words[1]), words[2:]
        low, high, count, *owner = words
        now_ms = self._now_ms()
        found = [
            [_text(entry_id), claim.consumer, now_ms - claim.delivered_ms, claim.count]
            for entry_id, claim in sorted(group.pending.items())
            if (low == b"-" or entry_id >= _id(low))
            and (high == b"+" or entry_id <= _id(high))
            and now_ms - claim.delivered_ms >= idle_ms
            and owner in ([], [claim.consumer])
        ]
        return found[: int(count)]

    def _xclaim(self, key: bytes, name: bytes, consumer: bytes, min_idle: bytes, *words: bytes) -> list[Any]:
        stream, group = self._group(key, name)
        is_just_id = words[-1].upper() == b"JUSTID"
        words = words[:-1] if is_just_id else words
        retry_count: int | None = None
        if b"RETRYCOUNT" in words:
            words, retry_count = words[:-2], int(words[-1])
        now_ms, claimed = self._now_ms(), list[Any]()
        group.seen_ms[consumer] = now_ms
        for text in words:
            entry_id = _id(text)
            claim = group.pending.get(entry_id)
            if claim is None or now_ms - claim.delivered_ms < int(min_idle):
                continue
            claim.consumer, claim.delivered_ms = consumer, now_ms
            if retry_count is not None:
                claim.count = retry_count
            elif not is_just_id:
                claim.count += 1
            claimed.append(text if is_just_id else [text, list(stream.entries[entry_id])])
        return claimed


def _text(entry_id: Id) -> bytes:
    return b"%d-%d" % entry_id


def _id(text: bytes) -> Id:
    ms, _, n = text.partition(b"-")
    return int(ms), int(n)
