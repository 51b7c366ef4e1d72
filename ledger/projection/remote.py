"""Reading baselines from the projector's process."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.gate.baselines import BaselinePage, BaselineReader
from tollbook.ledger.projection.quack import RemoteStore

_ANSWER_S: Final = 5.0


def remote_reader(data_dir: Path) -> BaselineReader:
    """Return a reader of baselines; it connects again after the projector has restarted.

    A projector that does not answer within five seconds counts as down.
    """
    store = RemoteStore.open(data_dir)
    # A thread of its own: one that waits for a stopped projector must not use up the threads that others need.
    thread = ThreadPoolExecutor(1, thread_name_prefix="baselines")

    async def read(names: Sequence[str], /) -> BaselinePage:
        asked = asyncio.get_running_loop().run_in_executor(thread, store.baselines, names)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await asked
        except TimeoutError:
            raise BaselineUnavailable(f"the projector did not answer within {_ANSWER_S:.0f} s") from None

    return read
