"""The newest events that are known on this machine's disk, so that a ledger that went back is refused (G1, G8)."""

from collections.abc import Mapping
from pathlib import Path

from tollbook.inference.settings import Settings
from tollbook.ledger.errors import LedgerError
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId


def heads_on_disk(settings: Settings, ledger_id: str, partitions: int) -> Mapping[int, EntryId]:
    """Return the newest event of each partition that DuckDB or the archive's directory has, as far as they can be read.

    An object store is not asked: a command would wait for it. Blocks.
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
    from tollbook.inference.archive_place import archive_at
    from tollbook.ledger.archive.segments import read_manifest

    archive, found = archive_at(folder), dict[int, EntryId]()
    for partition in range(partitions):
        try:
            newest = archive.manifests(partition)[-1:]
            for name in newest:
                manifest = read_manifest(archive.storage, name)
                if manifest.ledger_id == ledger_id:
                    found[partition] = EntryId.parse(manifest.last_id)
        except (LedgerError, OSError):
            continue  # What is wrong with the archive, the projector, `verify` and `doctor` say.
    return found
