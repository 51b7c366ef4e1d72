"""`tollbook url`: print the address of the running system's Redis, for publishers and other clients."""

import typer


def url() -> int:
    """Print the address of Redis, with its password; logs and other commands hide it.

    Example: tollbook url
    """
    from tollbook.inference.address import find_redis_url
    from tollbook.inference.settings import load_settings

    typer.echo(find_redis_url(load_settings()))
    return 0
