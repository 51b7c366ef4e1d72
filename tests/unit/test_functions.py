"""The gate's source: a change of it is a deliberate act, and it says what it is."""

import hashlib
import re
from pathlib import Path
from typing import Final

from tollbook.ledger.gate.functions import LIBRARY, function, library_code

DIGEST: Final = Path(__file__).parents[1] / "golden" / f"{LIBRARY}.sha256"


def test_the_gate_is_the_one_that_was_tested_and_reviewed() -> None:
    digest = hashlib.sha256(library_code().encode()).hexdigest()
    assert digest == DIGEST.read_text(encoding="utf-8").split()[0], (
        "the gate's source has changed. Workers that already run keep the library on the server in step with their own "
        "source, so a change must be safe for both, or the library needs a new name. Where it is safe: run "
        "tests/contract and tests/stateful, then "
        "`sha256sum ledger/gate/functions/tollbook.lua > tests/golden/tollbook_v2.sha256`"
    )


def test_the_library_and_its_functions_are_named_by_version() -> None:
    code = library_code()
    assert code.startswith(f"#!lua name={LIBRARY}\n")
    assert re.fullmatch(r"tollbook_v[1-9]\d*", LIBRARY)
    names = re.findall(r"register_function\(\s*'([^']+)'", code) + re.findall(r"function_name = '([^']+)'", code)
    assert len(names) == code.count("redis.register_function(")
    assert all(name == function(name.removeprefix(f"{LIBRARY}_")) for name in names)


def test_the_header_lists_every_code_that_is_answered() -> None:
    code = library_code()
    header = re.search(r"Codes:\n(.*?)\nEvery function", code, re.DOTALL)
    assert header is not None
    answered = set(re.findall(r"\{ '([A-Z]{2,})'", code)) | {"DENIED", "WAIT"}
    assert answered == set(re.findall(r"^  ([A-Z]+) ", header[1], re.MULTILINE))
