"""Names and addresses that look harmless: a task with a command's id, parameters in the address of Redis."""

import duckdb
import pytest

from tollbook.inference.budgets import BudgetPolicy
from tollbook.inference.errors import SettingsError
from tollbook.inference.prepaid import expiry_request
from tollbook.inference.settings import load_settings
from tollbook.ledger.signature import Signature
from tollbook.schemas.identifiers import check_id, check_task_id, usage_call_id
from tollbook.schemas.policy import default_policy
from tollbook.views.queries import SPEND_COLUMNS, spend_sql


@pytest.mark.parametrize(
    "kind", ["plan-assigned", "plan-cleared", "credit-granted", "credit-revoked", "key-created", "key-revoked"]
)
def test_no_task_can_take_the_id_of_a_command(kind: str) -> None:
    """G4: a publisher who guesses the key of a grant must not be able to refuse it as a conflict."""
    with pytest.raises(ValueError, match="as commands' ids do"):
        check_task_id(Signature("ann", "invoice 1043", key="k1").command_id(kind))
    with pytest.raises(ValueError, match="as commands' ids do"):
        check_task_id(usage_call_id("k1"))


def test_no_task_can_take_the_id_of_a_credit_or_of_its_end() -> None:
    """G4: the projector would be refused as a conflict when it takes back what has expired."""
    request = expiry_request(
        budget="b:all:total", credit_id="invoice 1043", expires_ms=1, stamped_cap_nanousd=0,
        policy=BudgetPolicy(default_policy(), {}), version=0,
    )  # fmt: skip
    for command_id in (request.command_id, "credit invoice 1043"):
        with pytest.raises(ValueError, match="as commands' ids do"):
            check_task_id(command_id)


def test_no_task_can_take_the_id_of_a_charge_that_a_recovery_enters() -> None:
    """G4: neither a lost charge nor a noted one may be refused as a conflict."""
    for command_id in ("recovered 1700000000000-0", "unbooked task 1"):
        with pytest.raises(ValueError, match="as commands' ids do"):
            check_task_id(command_id)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        # Replies would have other types than the workers expect, and the workers would stop working.
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
    """`tollbook spend` queries the projection: SQL in an id must stay a value, here one that no user has."""
    connection = duckdb.connect()
    columns = SPEND_COLUMNS.split(", ")
    connection.execute(
        f"CREATE TABLE spend ({', '.join(f'{name} VARCHAR' for name in {*columns, 'user_id', 'period'})})"
    )
    connection.execute("INSERT INTO spend (user_id, period) VALUES ('ann', '2026-11'), ('O''Brien', '2026-11')")
    for user, found in (("O'Brien", 1), ("x' OR '1'='1", 0), ("ann'; DROP TABLE spend; --", 0), ("ann", 1)):
        assert len(connection.execute(spend_sql(check_id(user), None, 10)).fetchall()) == found
