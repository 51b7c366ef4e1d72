"""Tasks: which fields make one, which do not, and what makes two of them the same."""

import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tollbook.ledger import keys
from tollbook.ledger.keys import Keys
from tollbook.ledger.stream_owners import STREAM_OWNERS
from tollbook.schemas.policy import check_task, default_policy
from tollbook.schemas.tasks import (
    MAX_JSON_DEPTH,
    MAX_MESSAGES,
    MAX_METADATA_BYTES,
    MAX_TEXT_BYTES,
    InvalidTask,
    Task,
    task_from_fields,
)

SCORE = {"task": "score_post", "user_id": "u42", "prompt": "a post"}
SECRET = "the text of the prompt"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a post"}]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "fields",
    [
        SCORE,
        {"data": json.dumps(SCORE)},
        {"data": SCORE},
        {"task_type": "score_post", "user_id": "u42", "prompt": "a post"},
        {**SCORE, "plan": "", "task_id": "", "max_tokens": "", "metadata": ""},
        {"task": "score_post", "user_id": "u42", "messages": json.dumps(CHAT[1:])} | {"plan": "trial"},
    ],
)
def test_spellings_of_one_task(fields: dict[str, Any]) -> None:
    task = task_from_fields(fields)
    assert (task.task, task.user_id, task.plan or default_policy().default_plan) == ("score_post", "u42", "trial")
    assert [(message.role, message.content) for message in task.chat()] == [("user", "a post")]


def test_every_optional_field_is_read_from_text() -> None:
    task = task_from_fields(
        {
            "task": "generate_draft", "user_id": "u42", "plan": "growth", "task_id": "t-1", "campaign_id": "spring",
            "prompt": "Write", "system": "Be brief.", "max_tokens": "300", "temperature": "0.5",
            "model": "openai/gpt-4o-mini", "reply_to": "replies.u42", "metadata": '{"a": [1, null]}',
        }
    )  # fmt: skip
    assert task == Task(
        task="generate_draft", user_id="u42", plan="growth", task_id="t-1", campaign_id="spring",
        prompt="Write", system="Be brief.", max_tokens=300, temperature=0.5, model="openai/gpt-4o-mini",
        reply_to="replies.u42", metadata={"a": [1, None]},
    )  # fmt: skip
    assert [message.role for message in task.chat()] == ["system", "user"]


def test_ping_needs_nothing_else() -> None:
    assert task_from_fields({"task": "ping"}).user_id == "anonymous"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"task": ""}, "'task' is missing"),
        ({"task": "translate"}, "'task' must be one of 'classify_archetype', 'generate_draft', 'score_post'"),
        ({"task": "scor-post"}, "not 'scor-post'; did you mean 'score_post'?"),
        ({"user_id": ""}, "'user_id' is missing"),
        ({"user_id": "u\t42"}, "'user_id' must have no double quotes, backslashes, line breaks or control characters"),
        ({"user_id": "u42 "}, "'user_id' must have no space at its beginning or end"),
        ({"user_id": True}, "'user_id' must be text, not true"),
        ({"user_id": 4.2}, "'user_id' must be text, not 4.2"),
        ({"user_id": "u" * 201}, "'user_id' must have 1 to 200 characters, not 201"),
        ({"task_id": 'a"b'}, "'task_id' must have no double quotes"),
        ({"task_id": "usage k1"}, "'task_id' must not begin with 'usage' and a space"),
        ({"campaign_id": "a\nb"}, "'campaign_id' must have no double quotes, backslashes, line breaks"),
        ({"plan": "platinum"}, "'plan' must be one of 'trial', 'starter', 'growth', not 'platinum'"),
        ({"plan": "Growth"}, "not 'Growth'; did you mean 'growth'?"),
        ({"prompt": ""}, "'prompt' must not be empty"),
        ({"prompt": None}, "give one of 'prompt' and 'messages'"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "'max_tokens' and 'max_completion_tokens' differ"),
        ({"messages": json.dumps(CHAT)}, "give only one of 'prompt' and 'messages'"),
        ({"prompt": None, "messages": "[]"}, "'messages' must not be empty"),
        ({"prompt": None, "messages": json.dumps(CHAT), "system": "x"}, "'system' goes with 'prompt' only"),
        ({"prompt": None, "messages": "{"}, "'messages' is not JSON (character 2)"),
        (
            {"prompt": None, "messages": '[{"role":"robot","content":"x"}]'},
            "'messages[0].role' must be one of 'system', 'developer', 'user', 'assistant', 'tool', 'function', not",
        ),
        (
            {"prompt": None, "messages": '[{"role":"user","content":"x","nmae":"y"}]'},
            "unknown field 'nmae' in 'messages[0]'; did you mean 'name'?",
        ),
        ({"prompt": None, "messages": [CHAT[1]] * (MAX_MESSAGES + 1)}, "'messages' must be a list with at most 1000"),
        ({"prompt": "ä" * (MAX_TEXT_BYTES // 2) + "x"}, f"at most {MAX_TEXT_BYTES} bytes, not {MAX_TEXT_BYTES + 1}"),
        ({"max_tokens": "0"}, "'max_tokens' must be a whole number from 1 to 200000, not '0'"),
        ({"max_tokens": "200001"}, "'max_tokens' must be a whole number from 1 to 200000, not '200001'"),
        ({"max_tokens": "1.5"}, "'max_tokens' must be a whole number from 1 to 200000, not '1.5'"),
        ({"max_tokens": True}, "'max_tokens' must be a number, not true"),
        ({"temperature": False}, "'temperature' must be a number, not false"),
        ({"temperature": "nan"}, "'temperature' must be a number from 0 to 2, not 'nan'"),
        ({"temperature": "inf"}, "'temperature' must be a number from 0 to 2, not 'inf'"),
        ({"temperature": "2.1"}, "'temperature' must be a number from 0 to 2, not '2.1'"),
        ({"model": "bad model"}, "'model' must be a model id such as 'openai/gpt-4o-mini'"),
        ({"reply_to": "{tollbook:0}:ledger"}, "'reply_to' must be a stream name"),
        ({"reply_to": "generation"}, "'reply_to' must not be a stream or a key of a Tollbook, as 'generation' is"),
        ({"reply_to": "other:dead-letters"}, "'reply_to' must not be a stream or a key of a Tollbook"),
        ({"metadata": '{"a": 1, "b": [{"x": 1, "x": 2}]}'}, "'metadata' has the key 'x' twice"),
        ({"metadata": '{"a": 1, "\\u0061": 2}'}, "'metadata' has the key 'a' twice"),
        ({"metadata": f'{{"{SECRET}": 1, "{SECRET}": 2}}'}, f"'metadata' has a key of {len(SECRET)} characters twice"),
        (
            {"prompt": None, "messages": '[{"role": "user", "role": "system", "content": "x"}]'},
            "'messages' has the key 'role' twice",
        ),
        ({"metadata": "[1]"}, "'metadata' must be a JSON object, not a list"),
        ({"metadata": '{"a": NaN}'}, "'metadata' is not JSON"),
        ({"metadata": '{"a": 1e999}'}, "'metadata' must contain only finite numbers"),
        ({"metadata": {"a": {1}}}, "'metadata' must contain only JSON values"),
        (
            {"metadata": json.dumps({"a": "x" * MAX_METADATA_BYTES})},
            f"'metadata' must have at most {MAX_METADATA_BYTES} bytes as JSON",
        ),
        ({"metadata": {"a": _nested(MAX_JSON_DEPTH)}}, "'metadata' must not be nested deeper than 32 levels"),
        ({"metadata": "[" * 100_000}, "'metadata' is not JSON"),
        ({"priority": "high"}, "unknown field 'priority'; known fields: task, user_id, plan"),
        ({"Top-P": "1", "Max-Tokens": "5"}, "unknown field 'Max-Tokens'; did you mean 'max_tokens'?"),
    ],
)
def test_a_malformed_task_names_the_field_and_quotes_no_prompt(change: dict[str, Any], problem: str) -> None:
    """G10."""
    fields = {**SCORE, "prompt": SECRET} | change
    given = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(InvalidTask) as refused:
        check_task(task_from_fields(given), default_policy())
    assert problem in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("data", ["", "x", "[1]", "null", "1", b"\xff"])
def test_data_that_is_not_an_object_is_not_a_task(data: Any) -> None:
    with pytest.raises(InvalidTask):
        task_from_fields({"data": data})


def test_limits_themselves_are_allowed() -> None:
    at_limits = {
        "prompt": "ä" * (MAX_TEXT_BYTES // 2), "max_tokens": "200000", "temperature": "2",
        "metadata": {"a": _nested(MAX_JSON_DEPTH - 1)},
    }  # fmt: skip
    assert task_from_fields({**SCORE, **at_limits}).max_tokens == 200_000


TRACE = {"traceparent": f"00-{0xABC:032x}-{0xDEF:016x}-01", "tracestate": "vendor=1"}
SAME_WORK = [{"task_id": "t-2"}, {"reply_to": "other"}, {"metadata": '{"a":1}'}, {"plan": "trial"}, TRACE]
OTHER_WORK = [
    {"prompt": "a post."}, {"task": "extract_patterns"}, {"user_id": "u43"}, {"plan": "growth"}, {"campaign_id": "c"},
    {"system": "Be brief."}, {"max_tokens": "5"}, {"temperature": "0.5"}, {"model": "openai/gpt-4o"},
    {"tags": '{"team": "red"}'}, {"top_p": "0.9"}, {"stop": "END"}, {"response_format": '{"type": "json_object"}'},
]  # fmt: skip


@pytest.mark.parametrize("change", SAME_WORK)
def test_what_changes_neither_the_work_nor_its_price_keeps_the_hash(change: dict[str, str]) -> None:
    """G4: a publisher may send the same task again with another way to be answered."""
    assert task_from_fields({**SCORE, **change}).content_hash() == task_from_fields(SCORE).content_hash()


@pytest.mark.parametrize("change", OTHER_WORK)
def test_other_work_has_another_hash(change: dict[str, str]) -> None:
    """G4: the same task id with other content is a conflict."""
    assert task_from_fields({**SCORE, **change}).content_hash() != task_from_fields(SCORE).content_hash()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (TRACE["traceparent"], TRACE["traceparent"]),
        (TRACE["traceparent"].upper(), None),
        (f"01-{0xABC:032x}-{0xDEF:016x}-01-more", None),
        (f"00-{0:032x}-{0xDEF:016x}-01", None),
        (f"00-{0xABC:032x}-{0:016x}-01", None),
        ("x" * 1_000_000, None),
        (TRACE["traceparent"] + "\n", None),
        (7, None),
    ],
)
def test_a_malformed_trace_context_is_ignored_and_refuses_no_task(given: object, kept: str | None) -> None:
    task = task_from_fields({**SCORE, "traceparent": given, "tracestate": given})
    assert task.traceparent == kept


FULL = {
    **SCORE, "system": "Be brief.", "max_tokens": "300", "temperature": "0.5", "model": "openai/gpt-4o-mini",
    "campaign_id": "spring", "plan": "growth",
}  # fmt: skip
TALK = {
    "task": "score_post", "user_id": "ren\u00e9", "temperature": "1",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\u00e9\U0001f600"},
                 {"role": "assistant", "content": ""}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        (SCORE, "deaf017ccbd8f8d48de3a50ef6496338"),
        (FULL, "a403772097cd2ad2c6216ecd1b977317"),
        (TALK, "ffda1cc790fc4b6ab697db18202a2418"),
        # A null, and values of an SDK that only state the default, do not make another task.
        ({**SCORE, "stop": None, "n": 1, "tags": {}, "tools": []}, "deaf017ccbd8f8d48de3a50ef6496338"),
    ],
)
def test_the_hash_is_a_contract(fields: dict[str, Any], digest: str) -> None:
    """It is stored with every call: a change would turn redelivered tasks into conflicts."""
    assert task_from_fields(fields).content_hash() == digest


def test_half_of_a_surrogate_pair_is_replaced() -> None:
    """JSON can escape one; UTF-8 has none, and no provider takes it. Two halves make a character."""
    broken, whole = json.dumps("a\ud800b"), '"\\ud83d\\ude00"'
    fields = f'"task": "score_post", "user_id": "u42", "prompt": {broken}, "system": {whole}, "stop": [{broken}]'
    task = task_from_fields({"data": f'{{{fields}, "metadata": {{{broken}: {broken}}}}}'})
    assert (task.prompt, task.system, task.stop) == ("a\ufffdb", "\U0001f600", ("a\ufffdb",))
    assert task.metadata == {"a\ufffdb": "a\ufffdb"}
    parsed = task_from_fields(
        {"task": "score_post", "user_id": "u42", "messages": f'[{{"role": "user", "content": {broken}}}]'}
    )
    assert [message.text for message in parsed.chat()] == ["a\ufffdb"]
    with pytest.raises(InvalidTask, match="'user_id' must"):
        task_from_fields({"data": '{"task": "score_post", "user_id": "a\\ud800", "prompt": "x"}'})


@given(st.dictionaries(st.sampled_from([*Task.model_fields, "data", "x"]), st.text(max_size=30), max_size=6))
def test_any_fields_are_a_task_or_are_invalid(fields: dict[str, str]) -> None:
    try:
        task = task_from_fields(fields)
    except InvalidTask:
        return
    assert task_from_fields({"data": task.model_dump_json(exclude_none=True)}) == task


def test_caps_of_the_plans_are_the_published_ones() -> None:
    caps = default_policy().plan_caps_nanousd
    assert caps == {
        "trial": 5 * 10**9,
        "starter": 15 * 10**9,
        "growth": 40 * 10**9,
    }
    assert min(caps, key=caps.__getitem__) == default_policy().default_plan


def test_data_that_names_a_field_twice_is_refused_with_its_name() -> None:
    """One reader takes the first value, another the last: two users for one task."""
    with pytest.raises(InvalidTask, match=r"^'data' has the key 'user_id' twice$"):
        task_from_fields({"data": '{"task": "score_post", "user_id": "ann", "prompt": "x", "user_id": "bob"}'})


def test_two_spellings_of_one_task_are_one_task() -> None:
    """G4, G1: the same user, the same id, the same content."""
    one, other = (
        task_from_fields({**SCORE, "user_id": user, "task_id": f"t-{user}", "campaign_id": user})
        for user in ("rene\u0301", "ren\u00e9")
    )
    assert one == other
    assert one.content_hash() == other.content_hash()


@pytest.mark.parametrize("namespace", ["tollbook", "acme", "a.b_c-d", "0"])
def test_no_key_of_any_ledger_is_a_stream_for_replies(namespace: str) -> None:
    names = [
        *default_policy().streams, STREAM_OWNERS, keys.dead_letters(namespace), keys.projector_lease(namespace),
        keys.worker_key(namespace, "w"), keys.gateway_calls(namespace, "d"),
        keys.web_session(namespace, "d"), keys.web_link(namespace, "d"),
        keys.task_partition(namespace, "t"), keys.tidying_lease(namespace),
        keys.dropped_dead_letters(namespace), keys.processes(namespace),
        keys.dropped_tasks(namespace), keys.alerts(namespace), keys.alert_receivers(namespace),
        keys.fed_alerts(namespace), keys.raised_alerts(namespace), Keys(namespace).ledger,
    ]  # fmt: skip
    # Whoever adds a key adds it here.
    made = {name for name, made in inspect.getmembers(keys, inspect.isfunction) if made.__module__ == keys.__name__}
    assert made - {"is_reserved_key", "dataclass", "field"} == {
        "dead_letters", "dropped_dead_letters", "projector_lease", "tidying_lease", "processes",
        "dropped_tasks", "worker_key", "gateway_calls", "task_partition", "alerts", "alert_receivers",
        "fed_alerts", "raised_alerts", "web_session", "web_link",
    }  # fmt: skip
    for name in names:
        with pytest.raises(InvalidTask, match=r"'reply_to' must (not )?be"):
            check_task(task_from_fields({**SCORE, "reply_to": name}), default_policy())


@pytest.mark.parametrize("name", ["replies", "tollbook-replies", "app:results", "worker:7", "a:tasks", "generations"])
def test_any_other_stream_is_one_for_replies(name: str) -> None:
    assert task_from_fields({**SCORE, "reply_to": name}).reply_to == name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (42.0, "42"),
        (0.5, "0.5"),
        (1234567.0, "1234567"),
        (1234568.0, "1234568"),
        (0.12345678, "0.12345678"),
    ],
)
def test_numbers_that_differ_are_tags_that_differ(value: float, text: str) -> None:
    """Otherwise two cost centers would share a balance."""
    assert Task.model_validate({**SCORE, "tags": {"cost_center": value}}).tags == {"cost_center": text}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tag_that_is_not_a_finite_number_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="must have a text or a number under 'team', not"):
        Task.model_validate({**SCORE, "tags": {"team": value}})


def test_fields_that_a_budget_names_are_tags() -> None:
    fields = {"task": "score_post", "user_id": "u1", "prompt": "p", "team": "red", "region": "eu"}
    assert task_from_fields(fields, {"team", "region", "absent"}).tags == {"team": "red", "region": "eu"}
    both = task_from_fields({**fields, "tags": '{"team": "red", "x": 1}'}, {"team", "region"})
    assert both.tags == {"team": "red", "region": "eu", "x": "1"}
    # It is the same task however the tag is given.
    within = {**fields, "tags": {"team": "red", "region": "eu"}}
    del within["team"], within["region"]
    assert task_from_fields(within).content_hash() == task_from_fields(fields, {"team", "region"}).content_hash()
    with pytest.raises(InvalidTask, match=r"'team' and 'tags\.team' differ"):
        task_from_fields({**fields, "tags": {"team": "blue"}}, {"team", "region"})
    with pytest.raises(InvalidTask, match="unknown field 'region'"):
        task_from_fields(fields, {"team"})
    # A name of Tollbook's own stays what it is.
    assert task_from_fields({"task": "score_post", "user_id": "u1", "prompt": "p"}, {"user_id"}).tags is None
