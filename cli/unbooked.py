"""Showing the charges that the ledger could not take, for commands that look at its books."""

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
    """Return the noted charges, as far as this machine sees them: those in Redis, and its own files."""
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
    """Return what to tell people; nothing where there are none."""
    if not charges:
        return []
    total = format_usd(sum(charge["cost_nanousd"] for charge in charges), places=9)
    number = "1 charge" if len(charges) == 1 else f"{len(charges):,} charges"
    return [
        f"unbooked: {number}, {total} in all, made while the ledger lacked events that their process had seen; they "
        "are booked once the newer data is restored, else by `tollbook recover`",
        *(
            f"unbooked: call {charge['call_id']}, user {charge['user_id']}: "
            f"{format_usd(charge['cost_nanousd'], places=9)}, needs event {charge['seen']}"
            for charge in charges
        ),
    ]
