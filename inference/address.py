"""Finding the running system's Redis: from the settings, or from what `tollbook up` wrote to the data directory."""

from typing import TYPE_CHECKING

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.endpoint import EndpointError, read_endpoint

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings


def find_redis_url(settings: "Settings") -> str:
    """Return the server's URL.

    Errors: LedgerUnavailable if no URL is set and no Tollbook runs, or if the file of `tollbook up` cannot be read.
    """
    if settings.redis_url is not None:
        return settings.redis_url
    try:
        endpoint = read_endpoint(settings.data_dir)
    except EndpointError as exc:
        raise LedgerUnavailable(exc.message) from exc
    if endpoint is None:
        raise LedgerUnavailable(
            f"no Tollbook runs in {settings.data_dir}, and REDIS_URL is not set: start `tollbook up`, "
            "or set TOLLBOOK_DATA_DIR to the directory that it uses"
        )
    return endpoint.redis_url
