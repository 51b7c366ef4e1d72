"""`tollbook policy`: show the ledger's policy, compare it with a file, and apply a file."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli.money import AuthorOption, ReasonOption, sign
from tollbook.cli.options import JsonOption, data_settings

if TYPE_CHECKING:
    from tollbook.audit.policies import PolicyVersion
    from tollbook.inference.administration import Administration
    from tollbook.inference.current_policy import PolicyInForce
    from tollbook.inference.opening_balances import OpeningTally, ReadSpent
    from tollbook.inference.settings import Settings
    from tollbook.ledger.gate.requests import Position
    from tollbook.schemas.policy import Policy

app = typer.Typer(help="The ledger's policy: plans, caps, routes, budgets, prices.", no_args_is_help=True)

FileArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE]", help="A policy file; by default tollbook.toml or TOLLBOOK_POLICY, plus policy settings."
    ),
]
VersionOption = Annotated[int | None, typer.Option(min=0, help="A version of the policy; by default the one in force.")]


@app.command("show")
def show(
    version: VersionOption = None,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the policy as a policy file.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show the policy in force, or an earlier one: who applied it, when, why, and what it says.

    Example: tollbook policy show
    Example: tollbook policy show --toml > tollbook.toml
    """
    from tollbook.inference.current_policy import PolicyInForce
    from tollbook.inference.policy_toml import policy_toml
    from tollbook.views.policies import policy_document, print_policy

    versions = _versions()
    newest = versions[-1].applied.version if versions else 0
    wanted = newest if version is None else version
    found = next((each for each in versions if each.applied.version == wanted), None)
    if found is None and wanted != 0:
        raise typer.BadParameter(f"there is no version {wanted}: the newest is {newest}", param_hint="--version")
    in_force = PolicyInForce() if found is None else found.in_force
    if as_json:
        typer.echo(json.dumps(policy_document(found, in_force)))
    elif as_toml:
        typer.echo(policy_toml(in_force.policy), nl=False)
    else:
        print_policy(found, in_force, is_newest=wanted == newest, partitions=_partitions_of(versions))
    return 0


@app.command("history")
def history(as_json: JsonOption = False) -> int:
    """List every version of the policy: when, by whom, why, and what it changed.

    Example: tollbook policy history
    """
    from tollbook.views.policies import history_document, print_history

    versions = _versions()
    if as_json:
        typer.echo(json.dumps(history_document(versions)))
    else:
        print_history(versions)
    return 0


@app.command("schema")
def schema() -> int:
    """Print the JSON Schema of a policy file, with which an editor completes names and marks mistakes.

    Example: tollbook policy schema > tollbook.schema.json
    """
    from tollbook.inference.policy_file import policy_schema

    typer.echo(json.dumps(policy_schema(), indent=2))
    return 0


@app.command("diff")
def diff(file: FileArgument = None, as_json: JsonOption = False) -> int:
    """Show what a policy file would change in the ledger's policy. Exit code 1 if they differ.

    Example: tollbook policy diff
    """
    from tollbook.inference.administration import connect_administration
    from tollbook.views.policies import print_changes

    settings = data_settings()
    stated = _stated(settings, file)

    async def read() -> "PolicyInForce":
        async with connect_administration(settings, warns=False) as administration:
            return await administration.policy()

    in_force = asyncio.run(read())
    changes = _changes(in_force, stated)
    if as_json:
        typer.echo(json.dumps({"version": in_force.version, "changes": changes}))
    elif changes:
        print_changes(f"What it would change in policy {in_force.version}", [each["text"] for each in changes])
    else:
        typer.echo(f"no difference to policy {in_force.version} of the ledger")
    return 1 if changes else 0


@app.command("apply")
def apply(
    file: FileArgument = None,
    reason: ReasonOption = "",
    author: AuthorOption = None,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    backfills: Annotated[
        bool,
        typer.Option(
            "--backfill", help="Count what was already spent in the current window in new and changed budgets."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Put a policy file in force. Every process uses it from its next reservation on, without a restart.

    If an earlier change was applied in some partitions only, it is completed first.

    Example: tollbook policy apply --reason "weekly budgets for teams"
    Example: tollbook policy apply --reason "weekly budgets for teams" --backfill
    Example: tollbook policy apply december.toml --reason "new caps" --dry-run
    """
    from tollbook.inference.administration import connect_administration
    from tollbook.ledger.errors import PolicyChanged

    settings = data_settings()
    stated = _stated(settings, file)
    signature = None if is_dry else sign(author, reason)

    async def run() -> dict[str, Any]:
        async with connect_administration(settings, warns=False) as administration, AsyncExitStack() as stack:
            before = await administration.policy()
            document = await _describe_change(administration, before, stated, settings, backfills=backfills)
            if document["problems"] or signature is None:
                return document
            applied = await administration.apply_policy(
                stated,
                signature,
                based_on=before.version,
                read_spent=_read_spent(settings, stack),
                backfills=backfills,
            )
            _remember_applied(settings, administration.ledger_id, applied.in_force)
            return document | {"version": applied.in_force.version, "is_new": applied.is_new}

    try:
        done = asyncio.run(run())
    except PolicyChanged as exc:
        problem = f"{exc.message}: somebody else applied it in the meantime"
        typer.echo(f"tollbook: {problem}. Look at `tollbook policy diff`, and apply again", err=True)
        return 1
    if as_json:
        typer.echo(json.dumps(done))
    else:
        _tell_applied(done, is_dry=is_dry)
    return 1 if done["problems"] else 0


def _tell_applied(done: dict[str, Any], *, is_dry: bool) -> None:
    from tollbook.views.policies import print_changes

    if done["changes"]:
        print_changes(f"Changes to policy {done['in_force']}", [each["text"] for each in done["changes"]])
    for note in done["notes"]:
        typer.echo(f"note: {note}")
    for problem in done["problems"]:
        typer.echo(f"tollbook: {problem}", err=True)
    if done["problems"]:
        typer.echo("tollbook: nothing was changed", err=True)
    elif is_dry:
        typer.echo("nothing was changed (--dry-run)")
    elif done["is_new"]:
        typer.echo(f"policy {done['version']} is in force")
    else:
        typer.echo(f"nothing to do: policy {done['version']}, which is in force, says the same")


def _read_spent(settings: "Settings", stack: AsyncExitStack) -> "ReadSpent":
    """Return a reader of what was spent. It opens the ledger's history on first use."""
    opened: list[ReadSpent] = []

    async def read(partition: int, tally: "OpeningTally", after: "Position | None") -> "Position":
        from tollbook.audit.opening_balances import spent_reader
        from tollbook.cli.open_history import open_source

        if not opened:
            opened.append(spent_reader(await stack.enter_async_context(open_source(settings))))
        return await opened[0](partition, tally, after)

    return read


async def _describe_change(
    administration: "Administration",
    before: "PolicyInForce",
    stated: "Policy",
    settings: "Settings",
    *,
    backfills: bool,
) -> dict[str, Any]:
    """Return what would change, with notes and problems."""
    from tollbook.inference.policy_changes import backfill_problems, problems_on, remarks_on, user_id_problems
    from tollbook.inference.prices.catalogue import PriceCatalogue
    from tollbook.ledger.clock import now_ms

    return {
        "in_force": before.version,
        "version": before.version,
        "is_new": False,
        "changes": _changes(before, stated),
        "notes": remarks_on(
            before,
            stated,
            now_ms(),
            prices=PriceCatalogue.from_settings(settings, stated),
            backfills=backfills,
        ),
        "problems": problems_on(stated, administration.partitions)
        + user_id_problems(before.policy, stated, is_used=bool(before.version))
        + (backfill_problems(before, stated) if backfills else []),
    }


def _changes(in_force: "PolicyInForce", stated: "Policy") -> list[dict[str, Any]]:
    from tollbook.inference.policy_diff import policy_changes

    return [
        {"path": list(each.path), "before": each.before, "after": each.after, "text": each.text}
        for each in policy_changes(in_force.policy, stated)
    ]


def _stated(settings: "Settings", file: Path | None) -> "Policy":
    """Return the policy of `file`, or of the local file and settings. Errors: typer.BadParameter; SettingsError."""
    from tollbook.inference.policy_file import POLICY_FILE, read_policy_file
    from tollbook.inference.stated_policy import policy_of, policy_sources

    if file is not None:
        return read_policy_file(file).policy
    if not policy_sources(settings):
        raise typer.BadParameter(
            f"there is no {POLICY_FILE} in this directory, and no setting about the policy: name a file",
            param_hint="FILE",
        )
    return policy_of(settings)


def _versions() -> "list[PolicyVersion]":
    from tollbook.audit.policies import read_policy_versions
    from tollbook.cli.audit import open_reader

    async def read() -> "list[PolicyVersion]":
        async with open_reader() as reader:
            return await read_policy_versions(reader)

    return asyncio.run(read())


def _partitions_of(versions: "list[PolicyVersion]") -> int:
    return len({partition for each in versions for partition in each.partitions})


def _remember_applied(settings: "Settings", ledger_id: str, in_force: "PolicyInForce") -> None:
    from tollbook.inference.policy_changes import remember_applied

    if settings.data_dir.exists():
        remember_applied(settings.data_dir, ledger_id, in_force)
