"""The gate's source: every change of it is deliberate (its digest), and its header lists its functions and codes."""

import hashlib
import re
from pathlib import Path
from typing import Final

from tollbook.ledger.gate.functions import LIBRARY, function, library_code
from tollbook.ledger.gate.probe import acl_line

DIGEST: Final = Path(__file__).parents[1] / "golden" / f"{LIBRARY}.sha256"


def test_the_gate_is_the_one_that_was_tested_and_reviewed() -> None:
    digest = hashlib.sha256(library_code().encode()).hexdigest()
    assert digest == DIGEST.read_text(encoding="utf-8").split()[0], (
        "the gate's source has changed. Workers that already run keep the library on the server in step with their own "
        "source, so a change must be safe for both, or the library needs a new name. Where it is safe: run "
        f"tests/contract and tests/stateful, then write {digest} into tests/golden/{LIBRARY}.sha256"
    )


def test_the_library_and_its_functions_are_named_by_version() -> None:
    code = library_code()
    assert code.startswith(f"#!lua name={LIBRARY}\n")
    assert re.fullmatch(r"tollbook_v[1-9]\d*", LIBRARY)
    names = re.findall(r"register_function\(\s*'([^']+)'", code) + re.findall(r"function_name = '([^']+)'", code)
    assert len(names) == code.count("redis.register_function(")
    assert all(name == function(name.removeprefix(f"{LIBRARY}_")) for name in names)


def test_the_users_of_the_documents_may_run_every_command_of_the_server_side_code() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (Path(__file__).parents[2] / "ledger").rglob("*.lua")]
    assert len(sources) > 4
    commands = {
        name if name not in ("XGROUP", "XINFO") else f"{name}|{argument}"
        for source in sources
        for name, argument in re.findall(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?", source)
    }
    assert {f"+{name.lower()}" for name in commands} <= set(acl_line().split())


def test_the_header_lists_every_code_that_is_answered() -> None:
    answered = set(re.findall(r"\{ '([A-Z]{2,})'", library_code())) | {"DENIED", "WAIT"}
    assert answered == listed_codes()


def listed_codes() -> set[str]:
    header = re.search(r"Codes:\n(.*?)\nEvery function", library_code(), re.DOTALL)
    assert header is not None
    return set(re.findall(r"^  ([A-Z]+) ", header[1], re.MULTILINE))


def test_the_header_says_which_function_may_answer_which_code() -> None:
    code = library_code()
    table = re.search(r"\nEvery function.*?\nWhat has been spent", code, re.DOTALL)
    assert table is not None
    listed = {name: set(codes.split()) for name, codes in re.findall(r"^  (\w+) +([A-Z ]+)$", table[0], re.MULTILINE)}
    bodies = dict(re.findall(r"^local function (\w+)\((.*?)^end$", code, re.MULTILINE | re.DOTALL))
    functions = dict(re.findall(rf"'{LIBRARY}_(\w+)',(?: callback =)? (\w+)", code))
    answered = {name: codes_of(function, bodies) for name, function in functions.items()}
    assert {name: codes - {"LEDGER", "BACK"} for name, codes in answered.items() if codes} == listed
    refuses_strangers = {name for name, codes in answered.items() if {"LEDGER", "BACK"} <= codes}
    assert refuses_strangers == {name for name in listed if name not in ("create", "probe")}


def codes_of(function: str, bodies: dict[str, str]) -> set[str]:
    """Return the codes that a function names, or one that it calls."""
    body = re.sub(r"redis\.p?call\('\w+'", "", bodies[function])
    called = [name for name in bodies if name != function and re.search(rf"(?<![\w.]){name}\(", body)]
    return set(re.findall(r"'([A-Z]+)'", body)) & listed_codes() | {
        code for name in called for code in codes_of(name, bodies)
    }
