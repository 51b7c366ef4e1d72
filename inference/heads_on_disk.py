"""Reading the newest events on this machine's disk, so that a ledger that went back in time is refused (G1, G8)."""

from collections.abc import Mapping
from pathlib import Path

from tollbook.inference.settings import Settings
from tollbook.ledger.archive.manifests import manifests_in, read_manifest
from tollbook.ledger.archive.storage import Directory
from tollbook.ledger.errors import LedgerError
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId


def heads_on_disk(settings: Settings, ledger_id: str, partitions: int) -> Mapping[int, EntryId]:
    """Return the newest event of each partition in DuckDB or the archive's directory, as far as these can be read.

    An object store is not read, since a command would have to wait for it. Blocks.
    """
    found = dict.fromkeys(range(partitions), ZERO_ENTRY)
    if settings.projection_path.exists():
        from tollbook.ledger.projection.database import stored_heads

        found |= stored_heads(settings.projection_path, ledger_id)
    if settings.archive_url is None and settings.archive_path.is_dir():
        archived = _archived_heads(settings.archive_path, ledger_id, partitions)
        found |= {partition: max(found[partition], entry) for partition, entry in archived.items()}
    return found


def _archived_heads(folder: Path, ledger_id: str, partitions: int) -> dict[int, EntryId]:
    archive, found = Directory(folder), dict[int, EntryId]()
    for partition in range(partitions):
        try:
            for name in manifests_in(archive, partition)[-1:]:
                manifest = read_manifest(archive, name)
                if manifest.ledger_id == ledger_id:
                    found[partition] = EntryId.parse(manifest.last_id)
        except (LedgerError, OSError):
            continue  # The projector, `verify` and `doctor` report problems of the archive.
    return found
