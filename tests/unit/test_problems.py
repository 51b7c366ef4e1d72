"""Sentences about wrong input: none is pydantic's own, each names its field, and none shows a prompt or a secret."""

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from tests.quick import first_quick
from tollbook.inference.errors import SettingsError
from tollbook.inference.routing import MODEL_ROUTING, routing_with
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.manifests import Manifest
from tollbook.ledger.server.endpoint import Endpoint
from tollbook.schemas.events import Event, EventPayload
from tollbook.schemas.expectations import expectation
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import check_task, default_policy
from tollbook.schemas.problems import MAX_PROBLEMS, as_text, closest_name, problems_of, unknown_name
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.routes import Route
from tollbook.schemas.tasks import InvalidTask, Task, task_from_fields
from tollbook.schemas.usage import Usage

SECRET = "the text of the prompt"
FOREIGN = re.compile(
    r"Input should|Extra inputs|Value error|Field required|should (be|have|match)|\[type=|pydantic|codec|Task:"
    r"|a valid value"
)
PAYLOADS: tuple[type[BaseModel], ...] = get_args(get_args(EventPayload)[0])
MODELS: tuple[type[BaseModel], ...] = (
    Task, Message, Route, Usage, InferenceResult, Settings, Endpoint, Manifest, Event, *PAYLOADS,
)  # fmt: skip
VALID: dict[type[BaseModel], dict[str, Any]] = {
    Task: {"task": "score_post", "user_id": "u42", "prompt": SECRET},
    Message: {"role": "user", "content": SECRET},
    Route: MODEL_ROUTING[next(iter(MODEL_ROUTING))].model_dump(),
    InferenceResult: {"task_id": "t1", "status": "done"},
    Endpoint: {"redis_url": "redis://h", "namespace": "n", "pid": 1, "started_at": "2026-11-24T00:00:00Z"},
}
EXTRA_FORBIDDEN = [model for model in MODELS if model.model_config.get("extra") == "forbid"]


def refusal(model: type[BaseModel], values: Any) -> ValidationError | None:
    try:
        model.model_validate(values)
    except ValidationError as exc:
        return exc
    return None


def checked(error: ValidationError, model: Any) -> list[str]:
    """The sentences, none of which is in pydantic's words."""
    sentences = problems_of(error, model, limit=10_000)
    assert sentences
    for sentence in sentences:
        assert not FOREIGN.search(sentence), sentence
        assert "\n" not in sentence
        sentence.encode()
    own = [each["msg"] for each in error.errors() if each["type"] != "value_error"]
    assert not [message for message in own if message in as_text(sentences)]
    return sentences


def wrong_values(field: FieldInfo) -> Iterator[Any]:
    """A wrong input for the type and for each constraint of a field."""
    yield object()
    yield b"\xff"
    for mark in [*field.metadata, *(mark for part in _parts(field.annotation) for mark in part)]:
        match mark:
            case Ge(ge=int() | float() as least):
                yield least - 1
                yield str(least - 1)
            case Gt(gt=int() | float() as least):
                yield least
            case Le(le=int() | float() as most):
                yield most + 1
                yield float("nan")
                yield float("inf")
            case MaxLen(max_length=most):
                yield [{"role": "user", "content": SECRET}] * (most + 1)
            case MinLen():
                yield ""
            case _:
                yield "{a\nb}"


def _parts(annotation: Any) -> Iterator[list[Any]]:
    for part in (annotation, *get_args(annotation)):
        marks = getattr(part, "__metadata__", ())
        yield from ((mark.metadata if isinstance(mark, FieldInfo) else [mark]) for mark in marks)


@pytest.mark.parametrize(
    ("model", "name"),
    first_quick(60, [(model, name) for model in MODELS for name in model.model_fields]),
)
def test_wrong_values_are_reported_in_plain_words_with_their_field(model: type[BaseModel], name: str) -> None:
    for value in wrong_values(model.model_fields[name]):
        check_refusal_of(value, model, name)


def check_refusal_of(value: Any, model: type[BaseModel], name: str) -> None:
    error = refusal(model, {**VALID.get(model, {}), name: value})
    if error is None:
        # Fields that are ignored or have no limit refuse nothing.
        assert name in {"traceparent", "tracestate", "metadata", "usage", "stop", "content"} or not isinstance(
            value, bytes | type(object())
        )
        return
    told = " ".join(checked(error, model))
    alias = model.model_fields[name].validation_alias
    assert str(alias) in told or f"'{name}'" in told or f"'{name}." in told or f"'{name}[" in told
    assert SECRET not in told


def test_every_field_of_every_model_says_in_words_what_it_takes() -> None:
    vague = [
        f"{model.__name__}.{name}"
        for model in MODELS
        for name, field in model.model_fields.items()
        if not any(isinstance(mark, BeforeValidator) for mark in field.metadata)  # Its own text says it.
        if expectation(field.annotation, field.metadata) == "a valid value"
    ]
    assert vague == []


@pytest.mark.parametrize("model", MODELS)
def test_missing_fields_are_named(model: type[BaseModel]) -> None:
    # A default that is validated is one that a field can need, as a route for chat needs its limit.
    required = [name for name, field in model.model_fields.items() if field.is_required() or field.validate_default]
    error = refusal(model, {})
    sentences = checked(error, model) if error else []
    assert sentences == [f"'{name}' is missing" for name in required]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("value", [5, "x", None, [1]])
def test_a_value_that_is_not_an_object_is_reported(model: type[BaseModel], value: Any) -> None:
    error = refusal(model, value)
    assert error is not None
    (sentence,) = checked(error, model)
    assert sentence.startswith("the input must be a JSON object, not ")


@pytest.mark.parametrize("model", EXTRA_FORBIDDEN)
def test_a_name_in_another_spelling_gets_the_right_one(model: type[BaseModel]) -> None:
    for name in model.model_fields:
        for spelling in (name.upper(), name.replace("_", "-"), name.title(), name.replace("_", ""), f" {name}"):
            if spelling != name:
                error = refusal(model, {**VALID.get(model, {}), spelling: 1})
                assert error is not None
                assert f"unknown field {spelling!r}; did you mean {name!r}?" in checked(error, model)


def test_a_wrong_field_of_one_of_several_models_is_reported_without_a_type_name() -> None:
    error = refusal(Event, {"payload": {"type": "segment-sealed", "events": "x"}})
    assert error is not None
    sentences = checked(error, Event)
    assert "'payload.events' must be a whole number of at least 0, not 'x'" in sentences
    assert "'payload.segment' is missing" in sentences


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=3),
        st.text(st.characters(codec=None, categories=["Cs"]), max_size=2), st.just(10**400), st.decimals(),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
names = st.one_of(st.sampled_from([*Task.model_fields, *Message.model_fields]), st.text(max_size=12))


@given(st.sampled_from(MODELS), st.data())
def test_any_input_is_accepted_or_refused_in_plain_words(model: type[BaseModel], data: st.DataObject) -> None:
    known = st.sampled_from([str(field.validation_alias or name) for name, field in model.model_fields.items()])
    fields = data.draw(st.dictionaries(known | names, values, max_size=5))
    error = refusal(model, {**VALID.get(model, {}), **fields})
    if error is not None:
        checked(error, model)


@given(st.dictionaries(names | st.sampled_from(["data", "task_type"]), values, max_size=5))
def test_any_fields_are_a_task_or_refused_in_plain_words(fields: dict[str, Any]) -> None:
    told = ""
    try:
        task_from_fields({**VALID[Task], **fields})
    except InvalidTask as exc:
        told = str(exc)
    assert not FOREIGN.search(told), told
    assert told.encode().decode().isprintable()


@given(st.dictionaries(st.sampled_from([*Route.model_fields, "modle", "x"]), values, max_size=4))
def test_any_route_is_accepted_or_refused_in_plain_words(fields: dict[str, Any]) -> None:
    problems: tuple[str, ...] = ()
    try:
        routing_with({"score_post": fields})
    except SettingsError as exc:
        problems = exc.problems
    assert not FOREIGN.search(" ".join(problems)), problems
    assert all("score_post" in problem for problem in problems if not problem.startswith("known fields"))


@pytest.mark.parametrize(
    ("name", "known", "closest"),
    [
        ("top_k", ["temperature", "top_p"], "top_p"),
        ("User_ID", ["user_id", "task_id"], "user_id"),
        ("max-tokens", ["messages", "max_tokens"], "max_tokens"),
        ("userId", ["user_id"], "user_id"),
        ("modle", ["model", "fallback"], "model"),
        ("zzz", ["model", "fallback"], None),
        ("", ["model"], None),
        ("m" * 1_000_000, ["model"], None),
    ],
)
def test_the_closest_name_is_suggested(name: str, known: list[str], closest: str | None) -> None:
    assert closest_name(name, known) == closest


def test_an_unknown_name_is_reported_with_all_known_names() -> None:
    assert unknown_name("plan", "Grwth", ["trial", "growth"]) == (
        "unknown plan 'Grwth'; did you mean 'growth'? Known: trial, growth"
    )
    assert unknown_name("plan", "x", ["trial", "growth"]) == "unknown plan 'x'; known: trial, growth"


def test_a_message_of_many_problems_is_bounded() -> None:
    with pytest.raises(InvalidTask) as refused:
        task_from_fields({**VALID[Task], **{f"x{number}" * 100: SECRET for number in range(20_000)}})
    assert f"{20_000 - MAX_PROBLEMS} more problems" in str(refused.value)
    assert str(refused.value).count("known fields: task, user_id") == 1
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [SECRET]},
        {"prompt": 5, "system": {"text": SECRET}},
        {"prompt": None, "messages": json.dumps(SECRET)},
        {"prompt": None, "messages": [SECRET]},
        {"prompt": None, "messages": [[SECRET]]},
        {"prompt": None, "messages": [{"role": "user", "content": [SECRET]}]},
        {"metadata": SECRET},
        {"metadata": json.dumps(SECRET)},
        {"max_tokens": [SECRET]},
        {"propmt": SECRET},
        {"plan": SECRET},
        {"task": SECRET},
        {"user_id": f"{SECRET}\n"},
        {"model": SECRET},
        {"max_tokens": SECRET},
        {SECRET: "1"},
        {"prompt": "oneword", "plan": "oneword"},
        {"prompt": "oneword", "oneword": "1"},
        {"prompt": None, "messages": [{"role": "user", "content": "oneword"}], "plan": "oneword"},
        {"prompt": None, "messages": [{"role": "oneword", "content": "oneword"}]},
    ],
)
def test_no_problem_shows_a_prompt(fields: dict[str, Any]) -> None:
    """G10."""
    given = {name: value for name, value in {**VALID[Task], **fields}.items() if value is not None}
    with pytest.raises(InvalidTask) as refused:
        check_task(task_from_fields(given), default_policy())
    assert SECRET not in str(refused.value)
    assert "oneword" not in str(refused.value)


def test_no_repr_of_a_task_shows_its_prompt() -> None:
    """G10."""
    chat = [{"role": "user", "content": SECRET}]
    for task in (
        VALID[Task] | {"system": SECRET, "metadata": {"x": SECRET}},
        {**VALID[Task], "prompt": None, "messages": chat},
    ):
        assert SECRET not in repr(Task.model_validate(task))
    assert SECRET not in repr(Message(role="user", content=SECRET))
