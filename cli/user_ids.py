"""Translates user ids for commands: people use plain ids, even if the ledger has their hashes."""

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from tollbook.schemas.identifiers import find_hashed_ids, is_hashed_id, replace_hashed_ids

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings
    from tollbook.inference.user_ids import UserIds

# A Redis that does not answer must not block the answer of the projection.
_ANSWER_S: Final = 5.0


def on_ledger(settings: "Settings", user_id: str) -> str:
    """Return the id that a user has on the ledger: plain, or hashed.

    The running system's Redis decides; if none answers, the copy of the key in the data directory. A hash is returned
    unchanged.
    """
    if is_hashed_id(user_id):
        return user_id
    from tollbook.inference.address import find_redis_url
    from tollbook.ledger.errors import LedgerError

    async def ask(url: str) -> str:
        async with asyncio.timeout(_ANSWER_S), open_user_ids(settings, url) as user_ids:
            return user_id if user_ids is None else user_ids.on_ledger(user_id)

    try:
        url = find_redis_url(settings)
        # Imported here: without a running system, no client is needed.
        import asyncio

        from tollbook.cli.options import load_redis_alone

        load_redis_alone()
        return asyncio.run(ask(url))
    except (LedgerError, TimeoutError):
        from tollbook.inference.user_keys import derived_key, hash_of, read_key_copy

        key = read_key_copy(settings.data_dir)
        return user_id if key is None else hash_of(user_id, derived_key(key))


def on_ledger_or_none(settings: "Settings", user_id: str | None) -> str | None:
    """Return the id that a user has on the ledger, if one is given."""
    return None if user_id is None else on_ledger(settings, user_id)


def plain_ids(settings: "Settings", texts: Iterable[str]) -> Callable[[str], str]:
    """Return a function that replaces hashes in these texts by plain ids, where the table beside the ledger has them.

    A text is an id, or the value of a budget that is counted by user.
    """
    wanted = [each for text in dict.fromkeys(texts) for each in find_hashed_ids(text)]
    if not wanted:
        return lambda text: text
    import asyncio

    from tollbook.cli.options import load_redis_alone

    load_redis_alone()
    from tollbook.app.connect import readable_redis
    from tollbook.ledger.errors import LedgerError

    async def ask() -> dict[str, str]:
        async with (
            readable_redis(settings) as (url, _),
            asyncio.timeout(_ANSWER_S),
            open_user_ids(settings, url) as user_ids,
        ):
            return {} if user_ids is None else await user_ids.plain(wanted)

    try:
        known = asyncio.run(ask())
    except (LedgerError, TimeoutError):
        known = {}
    return lambda text: replace_hashed_ids(text, known)


@asynccontextmanager
async def open_user_ids(settings: "Settings", redis_url: str) -> "AsyncGenerator[UserIds | None]":
    """Yield the user ids of the ledger in a Redis; None if they are plain. Errors: as `read_user_ids`."""
    from tollbook.app.connect import connected
    from tollbook.inference.user_ids import read_user_ids

    async with connected(settings.model_copy(update={"redis_url": redis_url})) as connection:
        yield await read_user_ids(connection.pipeline, settings.namespace)
