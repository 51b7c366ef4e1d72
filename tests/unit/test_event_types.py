"""A new type of event is known wherever an event must be: what would stop the projector is found here first."""

from typing import Final, get_args

import pytest

from tollbook.ledger.packaged import packaged_text
from tollbook.schemas.events import WITHOUT_CALL, EventPayload

TYPES: Final = tuple(payload.model_fields["type"].default for payload in get_args(get_args(EventPayload)[0]))


@pytest.mark.parametrize("kind", TYPES)
def test_the_fold_says_what_an_event_cannot_do_without(kind: str) -> None:
    assert f"WHEN '{kind}' THEN" in packaged_text("tollbook.ledger.projection.sql", "fold_read.sql")


@pytest.mark.parametrize("kind", TYPES)
def test_an_event_has_a_call_or_is_left_out_of_the_calls(kind: str) -> None:
    # What is not listed in SQL would become a call of its own in the view, or a life without a hold.
    lines = packaged_text("tollbook.ledger.projection.sql", "schema.sql").splitlines()
    (left_out,) = (line for line in lines if line.startswith("WHERE type NOT IN"))
    assert (f"'{kind}'" in left_out) == (kind in WITHOUT_CALL), "name it in WITHOUT_CALL too, if it has no call"
