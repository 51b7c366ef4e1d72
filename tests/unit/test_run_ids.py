"""The id of a run is text on the ledger, and names the process that it is in."""

import pytest

from tollbook.inference.calls.call import RunId


@pytest.mark.parametrize("process", ["worker-0", "host.example.com-17-a1b2c3"])
def test_a_run_id_is_read_as_it_was_written(process: str) -> None:
    run_id = RunId(process, "17")
    assert RunId.parse(str(run_id)) == run_id
