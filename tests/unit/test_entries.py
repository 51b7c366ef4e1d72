"""Task entries: a worker reads each one as it was made, and an entry that a worker would refuse is not made."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tollbook.consumers.messages import Delivery, read_task
from tollbook.schemas.entries import TaskFields, task_entry
from tollbook.schemas.identifiers import normalise_id
from tollbook.schemas.json_text import replace_surrogates
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import default_policy
from tollbook.schemas.tasks import MAX_ENTRY_BYTES, InvalidTask, Task

POLICY = default_policy()
POST: dict[str, Any] = {"task": "score_post", "user_id": "u1", "prompt": "a post"}


def read(fields: dict[str, str]) -> tuple[str, Task]:
    """Read an entry as a worker does."""
    raw = {name.encode(): value.encode() for name, value in fields.items()}
    return read_task(Delivery("generation", "1-0", raw))


texts = st.one_of(st.none(), st.text(max_size=20), st.sampled_from(["trial", "growth", "u42", "post-1", "\ud800", " "]))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.one_of(
        st.builds(Message, role=st.sampled_from(["user", "system"]), content=st.text(max_size=10)),
        st.fixed_dictionaries({"role": st.sampled_from(["user", "robot"]), "content": st.text(max_size=10)}),
    ),
    max_size=3,
)
given_fields = st.fixed_dictionaries(
    {"task": st.sampled_from(["score_post", "ping", "fly"])},
    optional={
        **dict.fromkeys(("user_id", "plan", "task_id", "prompt", "system", "model", "campaign_id", "reply_to"), texts),
        "messages": st.one_of(messages, st.just("[]"), st.just("{")),
        "max_tokens": st.one_of(st.integers(-1, 300_000), st.booleans(), st.just(1.5)),
        "temperature": st.one_of(st.floats(), st.sampled_from([0, 1, 2, 3])),
        "metadata": st.one_of(json_values, st.just(b"x"), st.just(object())),
    },
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(values=given_fields)
def test_an_entry_is_read_as_it_was_written_or_is_refused(values: dict[str, Any]) -> None:
    try:
        entry = task_entry("generation", values, new_id="new", policy=POLICY)
    except InvalidTask:
        return
    task_id, task = read(dict(entry.fields))
    assert task_id == entry.task_id == normalise_id(values.get("task_id") or "new")
    wanted = {name: value for name, value in values.items() if value is not None and (value != "" or name == "prompt")}
    for name in ("user_id", "plan", "prompt", "system", "model", "campaign_id", "reply_to", "max_tokens"):
        meant = wanted.get(name, Task.model_fields[name].default)
        meant = replace_surrogates(meant) if isinstance(meant, str) else meant
        is_id = name in ("user_id", "campaign_id") and isinstance(meant, str)
        assert getattr(task, name) == (normalise_id(meant) if is_id else meant), name
    assert task.temperature == values.get("temperature")
    assert task.metadata == (json.loads(json.dumps(values["metadata"])) if "metadata" in wanted else None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "fly"}, "'task' must be one of"),
        ({"prompt": ""}, "'prompt' must not be empty"),
        ({"user_id": None}, "'user_id' is missing"),
        ({"user_id": ""}, "'user_id' is missing"),
        ({"prompt": b"bytes"}, "'prompt' must be text, a number or a JSON value, not bytes"),
        ({"max_tokens": True}, "'max_tokens' must be a whole number from 1 to 200000, not 'true'"),
        ({"temperature": float("nan")}, "'temperature' must be a number from 0 to 2, not 'nan'"),
        ({"metadata": {"at": object()}}, "'metadata' must contain only JSON values"),
        ({"metadata": {"at": float("inf")}}, "'metadata' must contain only JSON values"),
        ({"metadata": [1]}, "'metadata' must be a JSON object"),
        ({"messages": [{"role": "user", "content": "x"}]}, "give only one of 'prompt' and 'messages'"),
        ({"color": "red"}, "unknown field 'color'"),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "\x01" * 400_000}]},
            f"at most {MAX_ENTRY_BYTES} bytes, not 2400",
        ),
    ],
)
def test_what_a_worker_would_refuse_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidTask, match=words):
        task_entry("generation", {**POST, **change}, new_id="new", policy=POLICY)


def test_an_unknown_stream_is_refused() -> None:
    with pytest.raises(InvalidTask, match="unknown stream 'tasks'; known: scraping, analysis"):
        task_entry("tasks", POST, new_id="new", policy=POLICY)
    assert task_entry("analysis", POST, new_id="new", policy=POLICY).stream == "analysis"


def test_an_entry_of_the_largest_size_is_made_and_read() -> None:
    values = {**POST, "prompt": None, "messages": [{"role": "user", "content": "\x01"}]}
    size = sum(
        len(part)
        for pair in task_entry("generation", values, new_id="n", policy=POLICY).fields.items()
        for part in pair
    )
    # Each of these characters takes six bytes of JSON and one of the text's own limit.
    more, rest = divmod(MAX_ENTRY_BYTES - size, 6)
    values["messages"] = [{"role": "user", "content": "\x01" * (1 + more) + "x" * rest}]
    task_id, _ = read(dict(task_entry("generation", values, new_id="n", policy=POLICY).fields))
    assert task_id == "n"
    values["messages"] = [{"role": "user", "content": "\x01" * (1 + more) + "x" * (rest + 1)}]
    with pytest.raises(InvalidTask, match=f"not {MAX_ENTRY_BYTES + 1}"):
        task_entry("generation", values, new_id="n", policy=POLICY)


def test_every_field_of_a_task_is_an_argument() -> None:
    aliases = {"max_completion_tokens", "streamed"}
    assert TaskFields.__annotations__.keys() - aliases == Task.model_fields.keys() - {
        "task",
        "prompt",
        "stream",  # The task stream, in a program: it is `streamed` there.
    }


def test_an_entry_has_its_ids_in_the_spelling_in_which_they_are_kept() -> None:
    entry = task_entry(
        "generation", {**POST, "user_id": "rene\u0301", "campaign_id": "e\u0301"}, new_id="e\u0301", policy=POLICY
    )
    assert (entry.task_id, entry.fields["user_id"], entry.fields["campaign_id"]) == ("\u00e9", "ren\u00e9", "\u00e9")
    assert entry.fields["task_id"] == entry.task_id


def test_metadata_with_keys_that_are_equal_in_json_is_refused() -> None:
    with pytest.raises(InvalidTask, match="'metadata' has the key '1' twice"):
        task_entry("generation", {**POST, "metadata": {1: "a", "1": "b"}}, new_id="new", policy=POLICY)
