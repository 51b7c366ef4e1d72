"""Addresses in an object store, as in settings and commands."""

import re
from typing import Final

# A bucket name by the rules of AWS, and folder names that need no escaping.
_ADDRESS: Final = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9!_.*'()=+-]+)*)/?")


def split_s3_url(url: str) -> tuple[str, str]:
    """Return bucket and prefix of `s3://bucket/prefix`. Errors: ValueError, which does not show the address."""
    found = _ADDRESS.fullmatch(url)
    if found is None:
        raise ValueError("must be an address such as s3://bucket/prefix, without key, query or port")
    return found[1], found[2].lstrip("/")
