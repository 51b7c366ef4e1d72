"""Reads and describes unbooked charges, for the commands that check the ledger's books."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tollbook.schemas.money import format_usd

if TYPE_CHECKING:
    from pathlib import Path

    from tollbook.ledger.keys import Keys
    from tollbook.ledger.server.pipeline import CommandPipeline


async def unbooked_charges(
    pipeline: "CommandPipeline", keys: Sequence["Keys"], ledger_id: str, data_dir: "Path"
) -> list[dict[str, Any]]:
    """Return the unbooked charges that this machine can see: those in Redis, and in its own files."""
    from tollbook.ledger.gate.unbooked import FOLDER, read_unbooked

    folder = data_dir / FOLDER
    return [
        {
            "call_id": charge.call_id,
            "hold": charge.hold,
            "user_id": charge.user_id,
            "period": charge.period,
            "cost_nanousd": charge.cost_nanousd,
            "assumed_nanousd": charge.assumed_nanousd,
            "seen": str(charge.seen),
        }
        for key in keys
        for charge in await read_unbooked(pipeline, key, ledger_id=ledger_id, folder=folder)
    ]


def describe_unbooked(charges: list[dict[str, Any]]) -> list[str]:
    """Return lines of text about the charges; no lines if there are none."""
    if not charges:
        return []
    total = format_usd(sum(charge["cost_nanousd"] for charge in charges), places=9)
    number = "1 charge" if len(charges) == 1 else f"{len(charges):,} charges"
    return [
        f"unbooked: {number}, {total} in all, made while the ledger lacked events that a process had already seen; "
        "restoring the newer data books them, or else `tollbook recover`",
        *(
            f"unbooked: call {charge['call_id']}, user {charge['user_id']}: "
            f"{format_usd(charge['cost_nanousd'], places=9)}, needs event {charge['seen']}"
            for charge in charges
        ),
    ]
