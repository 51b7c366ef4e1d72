"""Keys of the gateway as values: what may be shown of them, and what they may do."""

import hashlib
import json
import re
from typing import Any

import pytest

from tollbook.audit.verification.api_keys import KeyValue, changed_keys
from tollbook.inference.api_keys import (
    ApiKey,
    IssuedKey,
    hash_of,
    is_secret,
    issued_keys,
    key_id_of,
    secret_of,
)
from tollbook.inference.key_changes import CreatedKey, KeyBounds, check_bounds
from tollbook.schemas.policy import default_policy
from tollbook.schemas.tasks import InvalidTask

NOW_MS = 1_795_504_509_378
SECRET = secret_of(bytes(range(32)))


def key(**changes: Any) -> ApiKey:
    values: dict[str, Any] = {
        "key_id": "key-0123456789ab", "name": None, "user_id": "u42", "plan": None, "campaign_id": None, "tags": {},
        "models": (), "streams": (), "allows": frozenset(), "is_admin": False, "expires_ms": None,
    }  # fmt: skip
    return ApiKey(**values | changes)


def issued(**changes: Any) -> IssuedKey:
    return IssuedKey(**{"key": key(), "created_ms": 1, "created_by": "ops", "reason": "shop"} | changes)


def test_a_key_is_recognised_by_its_form() -> None:
    assert re.fullmatch(r"tb-[A-Za-z0-9_-]{43}", SECRET)
    assert is_secret(SECRET)
    assert not any(is_secret(text) for text in (SECRET[:-1], SECRET + "=", SECRET + "\n", "sk-" + SECRET[3:], ""))
    assert secret_of(b"\xff" * 32) == "tb-" + "_" * 42 + "8"
    assert key_id_of(b"\x01\x23\x45\x67\x89\xab") == "key-0123456789ab"
    assert hash_of(SECRET) == hashlib.sha256(SECRET.encode()).hexdigest()


def test_a_created_key_is_not_in_its_representation() -> None:
    created = CreatedKey("key-0123456789ab", SECRET)
    assert created.is_new
    assert SECRET not in f"{created!r}{created}"
    assert not CreatedKey("key-0123456789ab", None).is_new


def test_a_key_without_models_may_call_any_and_one_with_models_only_these() -> None:
    assert key().may_call("anything/at-all")
    bound = key(models=("generate_draft", "openai/gpt-4o-mini"))
    assert all(bound.may_call(name) for name in ("generate_draft", "openai/gpt-4o-mini", "gpt-4o-mini"))
    assert not any(bound.may_call(name) for name in ("score_post", "openai/gpt-4o", "", "GENERATE_DRAFT"))


@pytest.mark.parametrize(
    ("revoked_ms", "expires_ms", "state"),
    [
        (None, None, "active"),
        (NOW_MS + 1, NOW_MS + 1, "active"),
        (NOW_MS, None, "revoked"),
        (None, NOW_MS, "expired"),
        (NOW_MS + 1, NOW_MS, "expired"),
        (NOW_MS, NOW_MS, "revoked"),
    ],
)
def test_the_state_of_a_key(revoked_ms: int | None, expires_ms: int | None, state: str) -> None:
    assert issued(key=key(expires_ms=expires_ms), revoked_ms=revoked_ms).state(NOW_MS) == state


def fields(number: int, **changes: Any) -> dict[str, str]:
    digest = f"{number:064x}"
    value = {"created_ms": 10 - number, "key_id": f"key-{number:012x}", "hash": digest, "author": "a", "reason": "r"}
    return {digest: json.dumps(value | changes), f"key-{number:012x}": digest}


def test_keys_are_read_with_their_history_the_oldest_first() -> None:
    revoked = {
        f"{1:064x} revoked": json.dumps({"key_id": "key-000000000001", "at_ms": 5, "author": "b", "reason": "r"})
    }
    second, first = issued_keys(fields(2, replaces="key-000000000001", tags={"a": "b"}) | fields(1) | revoked)
    assert (second.key.key_id, second.created_ms, second.replaces) == ("key-000000000002", 8, "key-000000000001")
    assert second.key.tags == {"a": "b"}
    assert (first.revoked_ms, first.revoked_by, first.replaced_by) == (5, "b", "key-000000000002")


@pytest.mark.parametrize(
    "changes",
    [
        {"hash": "f" * 64},
        {"created_ms": None},
        {"allows": ["everything"]},
        {"is_admin": "perhaps"},
        {"expires_ms": -1},
        {"models": 5},
    ],
)
def test_a_record_that_the_gate_would_not_write_is_not_a_key(changes: dict[str, Any]) -> None:
    assert issued_keys(fields(1, **changes)) == ()
    assert len(issued_keys(fields(1))) == 1


@pytest.mark.parametrize("value", ["", "{", "[]", '{"at_ms":"soon"}', "null"])
def test_a_key_with_an_unreadable_revocation_is_refused(value: str) -> None:
    assert issued_keys(fields(1) | {f"{1:064x} revoked": value}) == ()


def test_bounds_are_kept_in_one_spelling_and_once() -> None:
    bounds = KeyBounds(
        name="Cafe\u0301", user_id="u1", plan="growth", tags={"team": "red"}, streams=("generation", "generation"),
        models=("gpt-4o-mini", "openai/gpt-4o-mini", "generate_draft", "else/model"), expires_ms=NOW_MS + 1,
    )  # fmt: skip
    checked = check_bounds(bounds, default_policy(), now_ms=NOW_MS)
    assert (checked.name, checked.streams) == ("Caf\u00e9", ("generation",))
    assert checked.models == ("openai/gpt-4o-mini", "generate_draft", "else/model")


@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        ({"plan": "growht"}, "unknown plan 'growht'; did you mean 'growth'"),
        ({"streams": ("generatoin",)}, "unknown stream 'generatoin'; did you mean 'generation'"),
        ({"models": ("generate_darft",)}, "unknown task type or model 'generate_darft'; did you mean 'generate_draft'"),
    ],
)
def test_names_that_the_policy_does_not_have_are_refused(bounds: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidTask, match=problem):
        check_bounds(KeyBounds(user_id="u1", **bounds), default_policy(), now_ms=NOW_MS)


@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        ({}, "a key needs a user whose budgets its calls count in"),
        ({"allows": frozenset({"plan"})}, "a key needs a user"),
        ({"user_id": "u1", "expires_ms": NOW_MS}, "must expire in the future"),
        ({"user_id": ""}, "the user must have 1 to 200 characters"),
        ({"user_id": "u1", "name": "a\nb"}, "the name must have no"),
        ({"user_id": "u1", "campaign_id": " x"}, "the campaign must have no space"),
        ({"user_id": "u1", "tags": {"user": "x"}}, "tags must not be named 'user'"),
        ({"user_id": "u1", "models": ("a/ b",)}, "'a/ b' is not a valid model id"),
    ],
)
def test_impossible_bounds_of_a_key_are_refused(bounds: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_bounds(KeyBounds(**bounds), default_policy(), now_ms=NOW_MS)


@pytest.mark.parametrize("bounds", [{"is_admin": True}, {"allows": frozenset({"user"})}])
def test_an_admin_or_a_key_whose_clients_name_users_needs_none(bounds: dict[str, Any]) -> None:
    assert check_bounds(KeyBounds(**bounds), default_policy(), now_ms=NOW_MS).user_id is None


def test_json_in_another_spelling_is_the_same() -> None:
    given = [
        KeyValue("key-1", "a" * 64, '{"key_id":"key-1","hash":"x"}', 7, None),
        KeyValue("key-1", "key-1", None, None, "a" * 64),
    ]
    found = {"a" * 64: '{"hash": "x", "created_ms": 7, "key_id": "key-1"}', "key-1": "a" * 64}
    assert changed_keys(found, given, without=()) == []
    assert changed_keys({}, given, without=("key-1",)) == []
    assert changed_keys({"nonsense": "{"}, (), without=()) == [
        "key 'nonsense': stands in Redis, and no event gives it"
    ]  # fmt: skip
