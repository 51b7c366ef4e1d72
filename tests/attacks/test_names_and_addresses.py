"""Names and addresses that look harmless: a task that bears a command's id, parameters in the address of Redis."""

import duckdb
import pytest

from tollbook.cli.spend import _COLUMNS, _sql
from tollbook.inference.errors import SettingsError
from tollbook.inference.settings import load_settings
from tollbook.ledger.signature import Signature
from tollbook.schemas.identifiers import check_id, check_task_id, usage_call_id


@pytest.mark.parametrize(
    "kind", ["plan-assigned", "plan-cleared", "credit-granted", "credit-revoked", "key-created", "key-revoked"]
)
def test_no_task_can_take_the_id_of_a_command(kind: str) -> None:
    """G4: a publisher who guesses the key of a grant must not be able to refuse it as a conflict."""
    with pytest.raises(ValueError, match="as commands' ids do"):
        check_task_id(Signature("ann", "invoice 1043", key="k1").command_id(kind))
    with pytest.raises(ValueError, match="as commands' ids do"):
        check_task_id(usage_call_id("k1"))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        # Replies would be read as other types than the workers expect: they would stand still.
        ("redis://h/0?protocol=3", "unknown parameter 'protocol'"),
        ("redis://h/0?decode_responses=True", "unknown parameter 'decode_responses'"),
        # A command would be sent again after a lost connection, a task published twice.
        ("redis://h/0?retry_on_timeout=True", "unknown parameter 'retry_on_timeout'"),
        ("redis://h/0?socket_timeout=1", "unknown parameter 'socket_timeout'"),
        ("redis://h/0?ssl_ca_certs=/ca.pem", "unknown parameter 'ssl_ca_certs'"),
        ("redis://h?db=first", "'db' must be the number of a database"),
        ("redis://u:pass/word@h/0", "has no valid port"),
        ("redis://:12?pass@h/0", "has an @ after a ?"),
        ("redis://:12?db=0&pass&word@h/0", "has an @ after a ?"),
        ("redis://h:123456", "has no valid port"),
    ],
)
def test_an_address_that_would_break_a_promise_is_refused(
    url: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(SettingsError) as caught:
        load_settings(env_file=None)
    (line,) = caught.value.problems
    assert problem in line
    assert "pass" not in line.replace("password", "")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@h:6379/3",
        "redis://h?db=3&username=u&password=secret&client_name=tollbook",
        "rediss://h/0?ssl_ca_certs=/ca.pem",
        "unix:///run/redis.sock?db=1",
    ],
)
def test_an_address_may_say_database_login_and_certificates(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    assert load_settings(env_file=None).redis_url == url


def test_an_id_with_an_apostrophe_stays_a_value_in_a_query() -> None:
    """`tollbook spend` asks the projector with a text: what looks like SQL in an id is a name, and no user's."""
    connection = duckdb.connect()
    columns = _COLUMNS.split(", ")
    connection.execute(
        f"CREATE TABLE spend ({', '.join(f'{name} VARCHAR' for name in {*columns, 'user_id', 'period'})})"
    )
    connection.execute("INSERT INTO spend (user_id, period) VALUES ('ann', '2026-11'), ('O''Brien', '2026-11')")
    for user, found in (("O'Brien", 1), ("x' OR '1'='1", 0), ("ann'; DROP TABLE spend; --", 0), ("ann", 1)):
        assert len(connection.execute(_sql(check_id(user), None, 10)).fetchall()) == found
