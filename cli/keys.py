"""`tollbook keys`: create, list, revoke and replace the keys with which programs call the HTTP gateway."""

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tollbook.cli.moments import parse_since, parse_span
from tollbook.cli.money import AuthorOption, KeyOption, run_signed
from tollbook.cli.options import (
    JsonOption,
    complete_plan,
    complete_stream,
    complete_task_type,
    data_settings,
    load_redis_alone,
    read_id,
)
from tollbook.cli.user_ids import plain_ids

if TYPE_CHECKING:
    from tollbook.inference.administration import Administration
    from tollbook.inference.api_keys import IssuedKey
    from tollbook.ledger.signature import Signature

app = typer.Typer(help="Keys of the HTTP gateway.", no_args_is_help=True)

_NO_REASON: Final = "no reason given"
_SHOWN_ONCE: Final = "The key is shown only now: Tollbook keeps only its hash."


class Attribute(StrEnum):
    """What a client may set on its own calls."""

    USER = "user"
    CAMPAIGN = "campaign"
    TAGS = "tags"
    PLAN = "plan"


ReasonOption = Annotated[str, typer.Option(help="The reason; recorded on the ledger.")]
AfterOption = Annotated[
    str | None, typer.Option(help="Revoke the key after a time, such as 24h or 30m; by default at once.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as in `keys list`; or the key itself.")]


@app.command("create")
def create_key(
    user: Annotated[str | None, typer.Option(help="User who is charged for its calls.", callback=read_id)] = None,
    plan: Annotated[str | None, typer.Option(help="Plan of its calls.", autocompletion=complete_plan)] = None,
    campaign: Annotated[str | None, typer.Option(help="Campaign of its calls.", callback=read_id)] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A tag of its calls; repeatable.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model or task type that it may call; repeatable; by default any.", autocompletion=complete_task_type
        ),
    ] = None,
    stream: Annotated[
        list[str] | None,
        typer.Option(
            help="A task stream that its calls may count under; repeatable; the first is the default.",
            autocompletion=complete_stream,
        ),
    ] = None,
    allow: Annotated[
        list[Attribute] | None,
        typer.Option(help="What the client may set on its calls; repeatable; by default nothing."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name for people.", callback=read_id)] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may see everything, and change keys, credit and plans.")
    ] = False,
    expires: Annotated[
        str | None, typer.Option(help="When it expires: a time in UTC (2027-01-31, 2027-01-31T12:00:00Z) or after 90d.")
    ] = None,
    reason: ReasonOption = _NO_REASON,
    author: AuthorOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Create a key and print it. It is printed only once: Tollbook keeps only its hash.

    Its calls are charged to its user. With --allow user, the client names the user of each call.

    Example: tollbook keys create --user u42 --plan growth --tag team=red --reason "the shop"
    Example: tollbook keys create --admin --name ops --expires 90d
    """
    from tollbook.inference.key_changes import KeyBounds

    bounds = KeyBounds(
        name=name,
        user_id=user,
        plan=plan,
        campaign_id=campaign,
        tags=_tags(tag or ()),
        models=tuple(model or ()),
        streams=tuple(stream or ()),
        allows=frozenset(each.value for each in allow or ()),
        is_admin=admin,
        expires_ms=None if expires is None else _expiry_ms(expires),
    )

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        from tollbook.schemas.tasks import InvalidTask

        try:
            created = await administration.keys.create(bounds, signature)
        except (InvalidTask, ValueError) as exc:
            raise typer.BadParameter(str(exc)) from None
        return {"key": created.secret, "key_id": created.key_id, "is_new": created.is_new}

    done = run_signed(run, author, reason, key)
    if not done["is_new"]:
        problem = f"a key was already created with --key {key}; it was shown then, and cannot be shown again"
        typer.echo(f"tollbook: {problem}. Revoke that key, and create another one with another --key", err=True)
        return 1
    return _tell_key(done, as_json=as_json)


@app.command("list")
def list_keys(as_json: JsonOption = False) -> int:
    """List the keys: whose they are, what they may do, and whether they are accepted.

    Example: tollbook keys list
    """
    from tollbook.views.api_keys import key_document, print_keys

    keys, now_ms = _read()
    plain = plain_ids(data_settings(), (each.key.user_id for each in keys if each.key.user_id))
    documents = [key_document(each, now_ms) for each in keys]
    documents = [each | {"user_id": each["user_id"] and plain(each["user_id"])} for each in documents]
    if as_json:
        typer.echo(json.dumps(documents))
    elif documents:
        print_keys(documents)
    else:
        typer.echo("there are no keys: `tollbook keys create --user USER` creates one")
    return 0


@app.command("revoke")
def revoke_key(
    key_id: KeyArgument,
    after: AfterOption = None,
    reason: ReasonOption = _NO_REASON,
    author: AuthorOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Revoke a key: the gateway no longer accepts it. Calls that are running finish.

    Example: tollbook keys revoke key-0123456789ab --reason "seen in a log"
    """
    after_ms = _after_ms(after)

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        from tollbook.ledger.errors import KeyAlreadyRevoked

        found = await _find(administration, key_id)
        _confirm(f"revoke {found.key.key_id}{_called(found)}", yes=yes)
        try:
            done = await administration.keys.revoke(found.key.key_id, signature, after_ms=after_ms)
            at_ms, is_new = done.at_ms, done.is_new
        except KeyAlreadyRevoked as exc:
            at_ms, is_new = exc.at_ms, False
        return {"key_id": found.key.key_id, "revoked_at": _utc(at_ms), "is_new": is_new}

    done = run_signed(run, author, reason)
    if as_json:
        typer.echo(json.dumps(done))
    else:
        text = f"{done['key_id']} is revoked from {done['revoked_at']} on"
        typer.echo(text if done["is_new"] else f"nothing to do: {text}")
    return 0


@app.command("rotate")
def rotate_key(
    key_id: KeyArgument,
    after: AfterOption = None,
    reason: ReasonOption = _NO_REASON,
    author: AuthorOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Replace a key: create one with the same rights, print it, and revoke the old key.

    Example: tollbook keys rotate key-0123456789ab --after 24h --reason "every quarter"
    """
    after_ms = _after_ms(after)

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        found = await _find(administration, key_id)
        _confirm(f"replace {found.key.key_id}{_called(found)}", yes=yes)
        created = await administration.keys.rotate(found.key.key_id, signature, after_ms=after_ms)
        return {"key": created.secret, "key_id": created.key_id, "replaces": found.key.key_id, "is_new": True}

    return _tell_key(run_signed(run, author, reason), as_json=as_json)


def _tell_key(done: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        typer.echo(json.dumps(done))
    else:
        typer.echo(f"key  {done['key']}")
        typer.echo(f"id   {done['key_id']}")
        typer.echo(_SHOWN_ONCE)
    return 0


def _tags(given: Sequence[str]) -> dict[str, str]:
    from tollbook.schemas.tags import read_tags

    try:
        return read_tags(given)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--tag") from None


def _expiry_ms(text: str) -> int:
    from tollbook.ledger.clock import now_ms

    if re.fullmatch(r"\d+[a-z]+", text):
        return now_ms() + parse_span(text, "--expires")
    return parse_since(text, "--expires")


def _after_ms(text: str | None) -> int:
    return 0 if text is None else parse_span(text, "--after")


async def _find(administration: "Administration", key_id: str) -> "IssuedKey":
    """Return a key by its id or its secret, which is never shown. Errors: KeyUnknown."""
    from tollbook.inference.api_keys import is_secret

    if is_secret(key_id):
        return await administration.keys.find_secret(key_id)
    if not re.fullmatch(r"key-[0-9a-f]{12}", key_id):
        raise typer.BadParameter("this is not the id of a key; ids look like key-0123456789ab", param_hint="ID")
    return await administration.keys.find(key_id)


def _confirm(text: str, *, yes: bool) -> None:
    """Ask at a terminal, because the wrong key may have been named. Errors: typer.Exit if the answer is no."""
    if not yes and sys.stdin.isatty() and not typer.confirm(f"{text[0].upper()}{text[1:]}?", err=True):
        raise typer.Exit(1)


def _called(found: "IssuedKey") -> str:
    names = [name for name in (found.key.name, found.key.user_id and f"user {found.key.user_id}") if name]
    return f" ({', '.join(names)})" if names else ""


def _utc(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _read() -> "tuple[tuple[IssuedKey, ...], int]":
    """Return the keys and the time by Redis' clock; also for a stopped system."""
    load_redis_alone()

    async def read() -> "tuple[tuple[IssuedKey, ...], int]":
        import time

        from tollbook.app.connect import connected, readable_redis
        from tollbook.inference.api_keys import ApiKeys
        from tollbook.ledger.keys import Keys

        settings = data_settings()
        async with AsyncExitStack() as stack:
            url, _ = await stack.enter_async_context(readable_redis(settings))
            connection = await stack.enter_async_context(connected(settings.model_copy(update={"redis_url": url})))
            keys = ApiKeys(connection.pipeline, Keys(settings.namespace), monotonic=time.monotonic)
            return await keys.list(), await keys.now_ms()

    return asyncio.run(read())
