"""A new type of event is handled wherever it must be: a gap that would stop the projector is found here first."""

from typing import Final, get_args

import pytest

from tollbook.ledger.archive import reentering
from tollbook.ledger.gate.functions import library_code
from tollbook.ledger.packaged import packaged_text
from tollbook.schemas.events import WITHOUT_CALL, EventPayload

PAYLOADS: Final = {payload.model_fields["type"].default: payload for payload in get_args(get_args(EventPayload)[0])}
TYPES: Final = tuple(PAYLOADS)
# A command's id is used once (G4): the gate keeps a record of it, as it does of a call.
COMMANDS: Final = tuple(
    kind for kind, payload in PAYLOADS.items() if kind in WITHOUT_CALL and "content_hash" in payload.model_fields
)


@pytest.mark.parametrize("kind", TYPES)
def test_the_fold_lists_the_required_fields_of_every_event(kind: str) -> None:
    assert f"WHEN '{kind}' THEN" in packaged_text("tollbook.ledger.projection.sql", "fold_read.sql")


@pytest.mark.parametrize("kind", TYPES)
def test_an_event_has_a_call_or_is_left_out_of_the_calls(kind: str) -> None:
    # A type that is not listed in SQL would appear as a call of its own, or as a call without a hold.
    lines = packaged_text("tollbook.ledger.projection.sql", "schema.sql").splitlines()
    (left_out,) = (line for line in lines if line.startswith("WHERE type NOT IN"))
    is_left_out = f"'{kind}'" in left_out
    assert is_left_out == (kind in WITHOUT_CALL), "name it in WITHOUT_CALL and schema.sql, or in neither"


@pytest.mark.parametrize("kind", TYPES)
def test_what_if_handles_or_skips_every_event(kind: str) -> None:
    assert f'"{kind}"' in packaged_text("tollbook.audit.what_if", "walk.py")


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_reader_of_command_records_knows_every_command(kind: str) -> None:
    assert f"'{kind}'" in packaged_text("tollbook.ledger.projection.sql", "trace_others.sql"), "the projector's check"
    assert f"'{kind}'" in packaged_text("tollbook.audit.sql", "verify_calls.sql"), "`verify`"
    assert f"APPLY['{kind}']" in library_code(), "`recover`, where the event is restored"
    if kind != "credit-expired":  # The projector lets the credit expire again, where it is due.
        assert kind in reentering._COMMANDS, "`recover`, where the event is entered again"
