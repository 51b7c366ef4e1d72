"""Manifests: the content of each sealed segment, and its place in the hash chain.

Separate from `segments`, so that a command that only asks how far the archive goes does not load pyarrow.
"""

from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tollbook.ledger.archive.storage import Storage
from tollbook.ledger.errors import LedgerError
from tollbook.schemas.problems import as_text, problems_of

FORMAT: Final = 1


class ArchiveDamaged(LedgerError):
    """A part of the archive is not what was sealed; the message names the file or object and the problem."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        self.problem = problem


class Manifest(BaseModel):
    """What a segment holds, and its place in the chain. Hashes are hexadecimal SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    ledger_id: str
    partition: int = Field(ge=0)
    segment: str
    first_id: str
    last_id: str
    first_seq: int = Field(ge=1)
    last_seq: int = Field(ge=1)
    events: int = Field(ge=1)
    chain_before: str
    chain_after: str
    file_sha256: str
    file_bytes: int
    schema_versions: dict[str, list[int]]

    def text(self) -> str:
        """Return the exact content of the manifest's file."""
        return self.model_dump_json(indent=2) + "\n"


def parquet_name(stem: str) -> str:
    """Return the name of the file with a segment's events."""
    return f"{stem}.parquet"


def manifest_name(stem: str) -> str:
    """Return the name of a segment's manifest."""
    return f"{stem}.json"


def folder_of(partition: int) -> str:
    """Return the name of a partition's folder."""
    return f"partition-{partition}"


def manifests_in(storage: Storage, partition: int | None = None) -> list[str]:
    """Return the names of all manifests, or of a partition's, in order."""
    folder = None if partition is None else folder_of(partition)
    return [name for name in storage.names(folder) if name.endswith(".json")]


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read a manifest and check that it belongs where it is. Errors: ArchiveDamaged."""
    place = storage.located(name)
    try:
        manifest = Manifest.model_validate_json(storage.read(name))
    except OSError as exc:
        raise ArchiveDamaged(place, f"cannot be read ({exc.strerror})") from exc
    except ValidationError as exc:
        raise ArchiveDamaged(place, f"is not a manifest ({as_text(problems_of(exc, Manifest))})") from exc
    if manifest.format != FORMAT:
        raise ArchiveDamaged(place, f"is of format {manifest.format}; this program reads format {FORMAT}")
    if manifest.segment != name.removesuffix(".json"):
        raise ArchiveDamaged(place, f"belongs to segment {manifest.segment}")
    return manifest
