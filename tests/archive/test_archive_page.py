"""docs/reference/archive.md is true: its verifier, written from the page alone, recomputes a real archive's chain."""

import ast
import asyncio
import hashlib
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator

from docs.generate.event_docs import PAYLOADS
from tests.archive.gate_ledger import GateLedger
from tests.archive_files import directory_of, file_of
from tests.quick import first_quick
from tests.system import Finished
from tollbook.audit.verification.certificates import Verdict
from tollbook.audit.verification.verification import Options, verify
from tollbook.inference.settings import Settings
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.manifests import Manifest
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.server.connection import connect

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "reference" / "archive.md").read_text("utf-8")


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)
    assert found, name
    return found[1]


def code(name: str) -> str:
    return between(name).partition("\n")[2].removesuffix("```")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def books(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GateLedger]:
    """Several segments of every kind of event, `segment-sealed` included."""
    async with connect(server_url) as redis:
        await redis.flushall()
        await redis.function_flush()
        made = GateLedger(redis, tmp_path_factory.mktemp("page"), 11)
        await made.begin()
        await made.run(250)
        await made.seal(segment_events=40)
        await made.run(120)
        await made.seal(segment_events=40, keep_events=50)
        yield made
        await made.aclose()


async def run_verifier(archive: Path, tmp_path: Path) -> Finished:
    script = tmp_path / "verifier.py"
    script.write_text(code("verifier"), "utf-8")
    # Isolated: nothing of this project can be imported by accident.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", script, archive, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    return Finished(process.returncode or 0, output.decode(), errors.decode())


@pytest.mark.slow
async def test_the_verifier_of_the_page_recomputes_the_chain_of_an_archive(books: GateLedger, tmp_path: Path) -> None:
    finished = await run_verifier(directory_of(books.archive), tmp_path)
    assert (finished.code, finished.stderr) == (0, "")
    last = books.archive.segments(0)[-1].manifest
    assert finished.stdout == f"partition-0 {last.last_seq} {last.chain_after}\n"
    assert len(books.archive.segments(0)) >= 4


def rewrite(path: Path, change: Any) -> None:
    """Change events and forge the manifest's hash of the file as well."""
    table = pq.ParquetFile(path).read()
    rows = table.to_pylist()
    change(rows)
    pq.write_table(table.from_pylist(rows, table.schema), path)
    manifest = path.with_suffix(".json")
    document = json.loads(manifest.read_text())
    document["file_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(document))


def cheaper(rows: list[dict[str, Any]]) -> None:
    rows[7]["amount"] += 1


def swapped(rows: list[dict[str, Any]]) -> None:
    for name in ("type", "payload", "amount", "committed", "user_id"):
        rows[7][name], rows[8][name] = rows[8][name], rows[7][name]


@pytest.mark.slow
@pytest.mark.parametrize("change", first_quick(1, [cheaper, swapped]))
async def test_the_verifier_of_the_page_names_the_first_event_that_is_not_what_was_sealed(
    books: GateLedger, tmp_path: Path, change: Any
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory_of(books.archive), copy)
    name = file_of(books.archive.segments(0)[1]).name
    rewrite(copy / "partition-0" / name, change)
    finished = await run_verifier(copy, tmp_path)
    assert finished.code == 1
    assert finished.stderr.strip() == f"{copy}/partition-0/{name}: event 48 is not what was sealed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "reported"), [(1, "partition-0/000000000081-.*: events are missing after 40"), (0, "missing after 0")]
)
async def test_the_verifier_of_the_page_misses_a_segment(
    books: GateLedger, tmp_path: Path, lost: int, reported: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory_of(books.archive), copy)
    path = file_of(books.archive.segments(0)[lost])
    (copy / "partition-0" / path.name).with_suffix(".json").unlink()
    assert re.search(reported, (await run_verifier(copy, tmp_path)).stderr)


async def test_the_worked_example_is_right() -> None:
    given = dict(line.split(maxsplit=1) for line in code("example").strip().splitlines())
    ledger_id = re.search(r"of the ledger `([\w-]+)`", PAGE)
    assert ledger_id
    genesis = hashlib.sha256(f"tollbook ledger {ledger_id[1]} partition 0".encode()).digest()
    digest = hashlib.sha256(given["canonical"].encode()).digest()
    head = hashlib.sha256(genesis + digest).digest()
    assert (given["genesis"], given["digest"], given["head"]) == (genesis.hex(), digest.hex(), head.hex())
    golden = json.loads((ROOT / "tests/golden/events/v1/credit-granted.json").read_text())
    parts = [golden["id"].encode(), *(value.encode() for value in golden["fields"].values())]
    assert chain.genesis(ledger_id[1], 0) == genesis
    assert chain.digest(parts[0], parts[1:]) == digest


@pytest.mark.slow
async def test_the_columns_and_manifest_fields_are_the_documented_ones(books: GateLedger) -> None:
    schema = pq.read_schema(file_of(books.archive.segments(0)[0]))
    documented = re.findall(r"^\| `(\w+)` \| ([\w\[\]]+) \|", between("columns"), re.MULTILINE)
    assert documented == [(name, str(kind)) for name, kind in zip(schema.names, schema.types, strict=True)]
    rows = re.findall(r"^\| (`.*?) \|", between("manifest"), re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(Manifest.model_fields)


async def test_a_later_event_names_the_sealed_segment_as_its_manifest_does(books: GateLedger) -> None:
    manifests = {each.manifest.segment: each.manifest for each in books.archive.segments(0)}
    files = str(directory_of(books.archive) / "*" / "*.parquet")
    reported = duckdb.execute(
        "SELECT seq, payload FROM read_parquet(?) WHERE type = 'segment-sealed' ORDER BY seq", [files]
    ).fetchall()
    assert len(reported) >= 2
    for seq, payload in reported:
        document = json.loads(payload)
        manifest = manifests[document["segment"]]
        assert seq > manifest.last_seq
        assert document == {name: getattr(manifest, name) for name in document}
        assert set(document) == {"segment", "first_id", "last_id", "events", "chain_before", "chain_after"}


async def test_every_archived_event_matches_its_json_schema(books: GateLedger) -> None:
    rows = duckdb.execute(
        "SELECT type, v, payload FROM read_parquet(?)", [str(directory_of(books.archive) / "*" / "*.parquet")]
    ).fetchall()
    schemas: dict[tuple[str, int], Draft202012Validator] = {}
    for kind, v, payload in rows:
        if (kind, v) not in schemas:
            schemas[kind, v] = Draft202012Validator(
                json.loads((ROOT / "docs" / "reference" / "schemas" / f"v{v}" / f"{kind}.json").read_text("utf-8"))
            )
        schemas[kind, v].validate(json.loads(payload))
    absent = {"ledger-recovered"}  # Nothing was lost here.
    assert {kind for kind, _ in schemas} == PAYLOADS.keys() - absent, "every other type of event was there"


@pytest.mark.slow
async def test_a_copied_archive_can_be_audited_without_redis(
    books: GateLedger, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The remains of a system: the archive, and a certificate that was kept elsewhere."""
    copy, certificate = tmp_path / "archive", tmp_path / "books.json"
    shutil.copytree(directory_of(books.archive), copy)
    newest = books.archive.segments(0)[-1]
    reported = await verified(copy, tmp_path_factory.mktemp("first"))
    assert reported.is_sound
    assert [part.head for part in reported.partitions] == [newest.manifest.chain_after]
    certificate.write_text(json.dumps(reported.certificate()), "utf-8")
    for path in (copy / "partition-0").glob(f"{file_of(newest).stem}.*"):
        path.unlink()
    shorter = await verified(copy, tmp_path_factory.mktemp("second"), against=str(certificate))
    assert ["before the trusted head" in finding.problem for finding in shorter.findings] == [True]


async def verified(archive: Path, directory: Path, **options: Any) -> Verdict:
    return await verify(LedgerSource.of_damaged_archive(Archive(archive)), Options(directory, **options))


async def test_every_setting_and_every_message_of_the_page_is_the_code_s() -> None:
    named = set(re.findall(r"`(TOLLBOOK_\w+)`", PAGE))
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert named == {name for name in known if "SEGMENT" in name or "STREAM_KEEP" in name or "ARCHIVE" in name}
    messages = templates("manifests.py", "segments.py", "sealing.py")
    for message in re.findall(r"^\| `([^`]+)`", between("problems"), re.MULTILINE):
        part = re.compile(re.sub(r"\b[ABNM]\b|\\\.\\\.\\\.", r".*", re.escape(message)))
        said = [template for template in messages if part.search(template) or as_pattern(template).fullmatch(message)]
        assert said, message


def templates(*modules: str) -> set[str]:
    """Every string in some modules of the ledger, with an asterisk for each inserted value."""
    found: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse((ROOT / "ledger" / "archive" / module).read_text("utf-8"))):
            match node:
                case ast.JoinedStr():
                    parts = [part.value if isinstance(part, ast.Constant) else "*" for part in node.values]
                    found.add("".join(map(str, parts)))
                case ast.Constant(value=str() as text):
                    found.add(text)
                case _:
                    pass
    return found


def as_pattern(template: str) -> re.Pattern[str]:
    return re.compile(".+".join(map(re.escape, template.split("*"))) if template.strip("* ") else r"(?!)")
