"""From stream entries to tasks: spellings, what can be salvaged, and that nothing is lost."""

import asyncio
import json
from typing import Any, Final

import pytest
from faststream.redis.parser import BinaryMessageFormatV1
from hypothesis import example, given
from hypothesis import strategies as st

from tollbook.consumers.messages import Delivery, Salvage, fields_as_json, fields_from_json, read_task, salvage
from tollbook.schemas.tasks import MAX_ENTRY_BYTES, InvalidTask

STREAM: Final = "generation"
ENTRY: Final = "1795504469412-3"
OWN_ID: Final = f"{STREAM}-{ENTRY}"
TASK: Final = {"task": "score_post", "user_id": "u1", "prompt": "a post"}


def delivery(fields: dict[bytes, bytes]) -> Delivery:
    return Delivery(STREAM, ENTRY, fields)


def plain(fields: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in fields.items()}


def envelope(document: Any, *, reply_to: str | None = None) -> dict[bytes, bytes]:
    encoding = BinaryMessageFormatV1.encode(
        message=document, reply_to=reply_to, headers=None, correlation_id="c1", serializer=None
    )
    return {b"__data__": asyncio.run(encoding)}


SPELLINGS: Final = {
    "plain fields": plain(TASK),
    "JSON in data": {b"data": json.dumps(TASK).encode()},
    "FastStream": envelope(TASK),
    "task_type": plain({"task_type": "score_post", "user_id": "u1", "prompt": "a post"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_task(spelling: str) -> None:
    task_id, task = read_task(delivery(SPELLINGS[spelling]))
    _, reference = read_task(delivery(plain(TASK)))
    assert task_id == OWN_ID
    assert task == reference
    assert task.content_hash() == reference.content_hash()


def test_the_publishers_task_id_wins_over_the_entrys() -> None:
    assert read_task(delivery(plain(TASK | {"task_id": "mine"})))[0] == "mine"


def test_a_field_named_data_is_ordinary_where_the_task_is_in_plain_fields() -> None:
    with pytest.raises(InvalidTask, match="data"):
        read_task(delivery(plain(TASK | {"data": "{}"})))


def test_faststreams_reply_to_counts_where_the_task_names_none() -> None:
    assert read_task(delivery(envelope(TASK, reply_to="answers")))[1].reply_to == "answers"
    assert read_task(delivery(envelope(TASK | {"reply_to": "own"}, reply_to="answers")))[1].reply_to == "own"


def test_an_entry_has_a_limit_of_bytes() -> None:
    fields = plain(TASK | {"metadata": ""})
    room = MAX_ENTRY_BYTES - sum(len(name) + len(value) for name, value in fields.items())
    # The metadata are refused for another reason, which shows that they were looked at.
    with pytest.raises(InvalidTask, match="metadata"):
        read_task(delivery(fields | {b"metadata": b"x" * room}))
    with pytest.raises(InvalidTask, match=str(MAX_ENTRY_BYTES + 1)):
        read_task(delivery(fields | {b"metadata": b"x" * (room + 1)}))


# What is sent -> the task id, user and reply stream that its publisher is answered under.
SALVAGED: Final[dict[str, tuple[dict[bytes, bytes], tuple[str, str | None, str | None]]]] = {
    "nothing readable": ({b"\xff": b"\xff"}, (OWN_ID, None, None)),
    "all three": (
        plain({"task": "?", "task_id": "t1", "user_id": "u1", "reply_to": "answers"}), ("t1", "u1", "answers")
    ),
    "beside a field that is not UTF-8": (
        plain({"task_id": "t1", "user_id": "u1", "reply_to": "answers"}) | {b"prompt": b"\xff"}, ("t1", "u1", "answers")
    ),
    "beside a field that is too large": (
        plain({"task_id": "t1"}) | {b"prompt": b"x" * MAX_ENTRY_BYTES}, ("t1", None, None)
    ),
    "a task id that is not UTF-8": ({b"task_id": b"t\xff 1", b"user_id": b"u1"}, (OWN_ID, "u1", None)),
    "a task id of a command": (plain({"task_id": "usage k1"}), (OWN_ID, None, None)),
    "a task id that is none": (plain({"task_id": 'a"b'}), (OWN_ID, None, None)),
    "a task id of 10,000 characters": (plain({"task_id": "t" * 10_000}), (OWN_ID, None, None)),
    "a reply stream that is a key of the ledger": (
        plain({"task_id": "t1", "reply_to": "{tollbook:0}:ledger"}), ("t1", None, None)
    ),
    "in data": ({b"data": b'{"task_id": "t1", "user_id": "u1", "task": 5}'}, ("t1", "u1", None)),
    "ids in data that are no strings": ({b"data": b'{"task_id": 5, "user_id": ["u1"]}'}, ("5", None, None)),
    "data is no object": ({b"data": b"[]"}, (OWN_ID, None, None)),
    "data is too deep": ({b"data": b"[" * 100_000}, (OWN_ID, None, None)),
    "data beside a task id": ({b"data": b"{", b"task_id": b"t1"}, ("t1", None, None)),
    "in FastStream's envelope": (envelope({"task_id": "t1", "task": "?"}, reply_to="answers"), ("t1", None, "answers")),
    "a broken envelope": ({b"__data__": b"\x00"}, (OWN_ID, None, None)),
}  # fmt: skip


@pytest.mark.parametrize("case", SALVAGED)
def test_salvage_reads_what_can_be_read(case: str) -> None:
    fields, expected = SALVAGED[case]
    with pytest.raises(InvalidTask):
        read_task(delivery(fields))
    found = salvage(delivery(fields))
    assert (found.task_id, found.user_id, found.reply_to) == expected


NAMES: Final = st.one_of(
    st.sampled_from([name.encode() for name in (*TASK, "data", "__data__", "task_id", "messages", "metadata", "plan")]),
    st.binary(max_size=20),
)
VALUES: Final = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(str.encode),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)
ENTRIES: Final = st.dictionaries(NAMES, VALUES, min_size=1, max_size=8)


@given(ENTRIES)
@example({b"__data__": b"\x89BIN\r\n\x1a\n"})
@example({b"data": b'{"task": "ping", "task_id": "\\ud800"}'})
@example({b"data": b'{"task": "ping", "\\ud800": 1}'})
@example({b"task": b"ping", b"x" * 1_000_000: b"1"})
def test_any_entry_is_a_task_or_an_invalid_one_that_can_be_answered(fields: dict[bytes, bytes]) -> None:
    entry = delivery(fields)
    found = salvage(entry)
    try:
        task_id, task = read_task(entry)
    except InvalidTask as exc:
        problem = str(exc)
    else:
        assert task.chat()
        found, problem = Salvage(task_id), "none"
    # Both go into a result and a dead letter, so they can be written in UTF-8.
    assert 0 < len(problem.encode()) < 2000
    assert found.task_id.encode()


@given(ENTRIES)
@example({b"base64:YQ==": b"base64:YQ=="})
@example({b"a": b'{"base64": "YQ=="}'})
@example({b"\xff": b"\xff", b"base64:/w==": b"x"})
def test_fields_come_back_from_json_byte_for_byte(fields: dict[bytes, bytes]) -> None:
    assert fields_from_json(fields_as_json(fields)) == fields


def test_a_faststream_message_that_names_a_field_twice_is_refused_with_its_name() -> None:
    twice = envelope(TASK)[b"__data__"].replace(b'"prompt"', b'"user_id"')
    with pytest.raises(InvalidTask, match="the FastStream message has the key 'user_id' twice"):
        read_task(delivery({b"__data__": twice}))


@pytest.mark.parametrize("reply_to", ["other:dead-letters", "other:task:t-1", "{other:0}:ledger"])
def test_no_answer_to_a_malformed_message_goes_to_a_stream_of_a_tollbook(reply_to: str) -> None:
    assert salvage(delivery(plain({"task": "fly", "reply_to": reply_to}))).reply_to is None


def test_the_answer_to_a_malformed_message_has_its_ids_as_they_are_kept() -> None:
    known = salvage(delivery(plain({"task": "fly", "task_id": "e\u0301", "user_id": "rene\u0301"})))
    assert (known.task_id, known.user_id) == ("\u00e9", "ren\u00e9")
