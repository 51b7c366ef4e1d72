"""Errors of Redis and its client, as people read them."""

import pytest
from redis.exceptions import AuthenticationError, InvalidResponse, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from tollbook.inference.errors import TaskUnconfirmed
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.refusals import explain

PROTECTED_MODE = (
    "DENIED Redis is running in protected mode because protected mode is enabled and no password is set for the "
    "default user. In this mode connections are only accepted from the loopback interface. If you want to connect "
    "from external computers to Redis you may adopt one of the following solutions:\n1) Just disable it.\n2)"
)
TOLD: dict[str, tuple[RedisError, str]] = {
    "nobody listens": (
        RedisConnectionError("Error 111 connecting to 127.0.0.1:1. Connect call failed ('127.0.0.1', 1)."),
        "nothing listens there",
    ),
    "no such host": (RedisConnectionError("Error -2 connecting to x:6379. Name or service not known."), "no such host"),
    "no password given": (AuthenticationError("Authentication required."), "it requires a password"),
    "wrong password": (AuthenticationError("invalid username-password pair or user is disabled."), "password is wrong"),
    "password not wanted": (
        AuthenticationError(
            "AUTH <password> called without any password configured for the default user. Are you sure your "
            "configuration is correct?"
        ),
        "it has no password, but REDIS_URL gives one",
    ),
    "protected mode": (ResponseError(PROTECTED_MODE), "it is in protected mode"),
    "not allowed": (
        NoPermissionError("User bob has no permissions to run the 'xadd' command"),
        "this user may not use the 'xadd'",
    ),
    "no Redis": (InvalidResponse("Protocol Error: b'HTTP/1.1 400 Bad Request'"), "is not Redis"),
    "no such database": (ResponseError("DB index is out of range"), "no such database"),
    "something else": (ResponseError("odd\nand long " + "x" * 1000), "odd and long xxx"),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_refusal_is_one_line_with_what_to_do(case: str) -> None:
    error, words = TOLD[case]
    ours = LedgerUnavailable(
        f"Redis at redis://h:1 does not answer: Redis did not answer ({type(error).__name__}: {error})"
    )
    ours.__cause__ = error
    for line in (explain(error), explain(ours)):
        assert words in line
        assert len(line.splitlines()) == 1
        assert len(line) < 400
    assert explain(ours).startswith("Redis at redis://h:1 ")


def test_messages_of_our_own_errors_are_unchanged() -> None:
    lost = TaskUnconfirmed("t1", "Redis did not answer (ConnectionError: Connection refused.)")
    lost.__cause__ = RedisConnectionError("Connection refused.")
    assert explain(lost).startswith("task t1 may or may not have been published (nothing listens there")
    assert explain(lost).endswith("publish it again with this task_id")
    assert explain(LedgerUnavailable("the publisher is not open")) == "the publisher is not open"
