"""`tollbook what-if`: run the recorded ledger under other caps, prices or routes."""

import asyncio
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tollbook.cli.moments import UntilOption, parse_moment
from tollbook.cli.options import ArchiveOption, JsonOption, check_id, check_usd, data_settings, read_id, read_period
from tollbook.cli.user_ids import on_ledger, on_ledger_or_none, plain_ids
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.problems import unknown_name

if TYPE_CHECKING:
    from tollbook.audit.what_if import Alternatives, OtherRoute, Outcome
    from tollbook.inference.prices.model_price import ModelPrice
    from tollbook.inference.settings import Settings
    from tollbook.schemas.policy import Policy
    from tollbook.schemas.routes import Route, Target


def what_if(
    cap: Annotated[list[str] | None, typer.Option(help="Another cap of a plan, in dollars: trial=3.")] = None,
    user_cap: Annotated[list[str] | None, typer.Option(help="Another cap of a user, in dollars: u42=8.")] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(help="Another price of a model, in dollars per million tokens: MODEL=PROMPT,COMPLETION."),
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option(help="Other models for a task type, with the recorded answers: TASK=MODEL[,FALLBACK]."),
    ] = None,
    fallback: Annotated[
        list[str] | None, typer.Option(help="Another fallback for a task type: TASK=MODEL, or TASK=none.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Use the caps, budgets, prices and routes of this policy file.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Only this user.", callback=read_id)] = None,
    period: Annotated[str | None, typer.Option(help="Only this billing period, YYYY-MM.", callback=read_period)] = None,
    until: UntilOption = None,
    top: Annotated[int, typer.Option(min=0, max=10_000, help="How many users, the most affected first.")] = 10,
    refusals: Annotated[
        int, typer.Option(min=0, max=100_000, help="How many of the calls that would be refused, the oldest first.")
    ] = 10,
    archive: ArchiveOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show what would have been spent and refused with other caps, prices or fallbacks. Nothing is changed.

    --cap, --user-cap, --price, --route and --fallback are repeatable, and override --policy.

    Example: tollbook what-if --cap trial=3 --price claude-3-haiku=0.8,4
    Example: tollbook what-if --policy december.toml
    """
    from tollbook.audit.what_if.assumptions import assumptions
    from tollbook.inference.policy_file import read_policy_file
    from tollbook.views.what_if import print_what_if, what_if_document

    settings = data_settings()
    user = on_ledger_or_none(settings, user)
    user_cap = [_with_user_on_ledger(settings, text) for text in user_cap or ()]
    other = None if policy is None else read_policy_file(policy).policy
    end = None if until is None else parse_moment(until, "--until")

    def alternatives_to(in_force: "Policy") -> "Alternatives":
        from tollbook.audit.what_if import Alternatives

        options = read_alternatives(
            cap or (), user_cap, price or (), route or (), fallback or (), policy=other or in_force
        )
        of_policy = Alternatives() if other is None else Alternatives.of_policy(other, in_force)
        return of_policy.with_changes(options)

    outcome, alternatives = asyncio.run(
        _walk(settings, alternatives_to, archive, end, kept_refusals=refusals, is_quiet=as_json)
    )
    selected = outcome.select(user_id=user, period=period)
    selected = selected.with_users(plain_ids(settings, (account.user_id for account in selected.accounts)))
    assumed = assumptions(alternatives, selected.total())
    if as_json:
        typer.echo(json.dumps(what_if_document(selected, top, assumed)))
    else:
        print_what_if(selected, top, assumed)
    return 0


def read_alternatives(
    caps: Sequence[str] = (),
    user_caps: Sequence[str] = (),
    prices: Sequence[str] = (),
    routes: Sequence[str] = (),
    fallbacks: Sequence[str] = (),
    *,
    policy: "Policy | None" = None,
) -> "Alternatives":
    """Parse the options into alternatives. Names are those of `policy`, by default of the default policy.

    Errors: typer.BadParameter.
    """
    from tollbook.audit.what_if import Alternatives
    from tollbook.schemas.policy import default_policy

    policy = policy or default_policy()
    return Alternatives(
        plan_caps_nanousd=dict(_plan_cap(text, policy) for text in caps),
        user_caps_nanousd=dict(_user_cap(text) for text in user_caps),
        prices={model: price for text in prices for model, price in _prices(text, policy)},
        routes=_routes(routes, fallbacks, policy),
    )


async def _walk(
    settings: "Settings",
    alternatives_to: "Callable[[Policy], Alternatives]",
    archive: str | None,
    end: EntryId | None,
    *,
    kept_refusals: int,
    is_quiet: bool,
) -> "tuple[Outcome, Alternatives]":
    """Walk the ledger.

    Events before its first policy use the policy that this system states. Prices are those of the last policy.
    """
    from tollbook.audit.policies import read_policy_versions
    from tollbook.audit.reader import AuditReader
    from tollbook.audit.what_if import RecordedCaps, WhatIf
    from tollbook.cli.open_history import open_source
    from tollbook.cli.progress import progress
    from tollbook.inference.prices.catalogue import PriceCatalogue
    from tollbook.inference.stated_policy import policy_of
    from tollbook.schemas.policy import default_policy

    async with open_source(settings, archive) as source:
        reader = AuditReader(source)
        versions = await read_policy_versions(reader)
        reader.close()
        before = policy_of(settings) if archive is None else default_policy()
        policy = versions[-1].in_force.policy if versions else before
        alternatives = alternatives_to(policy)
        walk = WhatIf(
            alternatives,
            PriceCatalogue.from_settings(settings, alternatives.policy or policy).price_anywhere,
            recorded_caps=RecordedCaps(plans=before.plan_caps_nanousd, users=before.user_caps_nanousd),
            hold_wait_ms=round(settings.hold_wait_s * 1000),
            kept_refusals=kept_refusals,
        )
        with progress("deciding", await source.count(), is_quiet=is_quiet) as advance:
            for keys in source.keys:
                async for events in source.events(keys.partition, until=end):
                    await asyncio.to_thread(walk.fold, events, keys.partition)
                    advance(events.num_rows)
    return walk.finish(), alternatives


def _split(text: str, hint: str, form: str) -> tuple[str, str]:
    name, separator, value = text.rpartition("=")
    if not separator or not name or not value:
        raise typer.BadParameter(f"{text!r} is not written {form}", param_hint=hint)
    return name, value


def _plan_cap(text: str, policy: "Policy") -> tuple[str, int]:
    plan, dollars = _split(text, "--cap", "PLAN=DOLLARS")
    if plan not in policy.plans:
        raise typer.BadParameter(unknown_name("plan", plan, policy.plans), param_hint="--cap")
    return plan, check_usd(dollars, "--cap")


def _with_user_on_ledger(settings: "Settings", text: str) -> str:
    user_id, dollars = _split(text, "--user-cap", "USER=DOLLARS")
    return f"{on_ledger(settings, check_id(user_id, '--user-cap'))}={dollars}"


def _user_cap(text: str) -> tuple[str, int]:
    user_id, dollars = _split(text, "--user-cap", "USER=DOLLARS")
    return check_id(user_id, "--user-cap"), check_usd(dollars, "--user-cap")


def _prices(text: str, policy: "Policy") -> "list[tuple[str, ModelPrice]]":
    from tollbook.inference.prices.model_price import price_from_usd
    from tollbook.schemas.routes import resolve_model

    name, values = _split(text, "--price", "MODEL=PROMPT,COMPLETION")
    parts = values.split(",")
    if len(parts) != 2:
        raise typer.BadParameter(f"{text!r} is not written MODEL=PROMPT,COMPLETION", param_hint="--price")
    for part in parts:
        check_usd(part, "--price")
    prompt, completion = (Decimal(part) for part in parts)
    models = {resolve_model(name)}
    # A short name belongs to the default provider, but another provider may have a model with exactly this id.
    if name in {target.model for route in policy.tasks.values() for target in _named_provider_targets(route)}:
        models.add(name)
    return [(model.lower(), price_from_usd(model, prompt=prompt, completion=completion)) for model in models]


def _named_provider_targets(route: "Route") -> "list[Target]":
    """Return the targets of a route that are not at the default provider."""
    from tollbook.schemas.routes import DEFAULT_PROVIDER

    cheaper = () if route.cheaper_target is None else (route.cheaper_target,)
    return [target for target in (route.first, *route.fallbacks, *cheaper) if target.provider != DEFAULT_PROVIDER]


def _routes(routes: Sequence[str], fallbacks: Sequence[str], policy: "Policy") -> "dict[str, OtherRoute]":
    from tollbook.audit.what_if import OtherRoute
    from tollbook.schemas.routes import DEFAULT_PROVIDER, resolve_model

    def model_of(name: str, task: str) -> str:
        """Return the model id of a short name. Only the default provider's models have short names."""
        return resolve_model(name) if policy.tasks[task].first.provider == DEFAULT_PROVIDER else name

    read: dict[str, OtherRoute] = {}
    for text in routes:
        task, models = _split(text, "--route", "TASK=MODEL[,FALLBACK]")
        names = models.split(",")
        if len(names) > 2 or not all(names):
            raise typer.BadParameter("a route has one model and at most one fallback", param_hint="--route")
        _task(task, "--route", policy)
        model, *fallback = (model_of(name, task) for name in names)
        read[task] = OtherRoute(model, tuple(fallback) or None)
    for text in fallbacks:
        task, name = _split(text, "--fallback", "TASK=MODEL")
        if "," in name:
            raise typer.BadParameter("a route has one fallback", param_hint="--fallback")
        model = read.get(_task(task, "--fallback", policy), OtherRoute()).model
        read[task] = OtherRoute(model, () if name == "none" else (model_of(name, task),))
    return read


def _task(name: str, hint: str, policy: "Policy") -> str:
    if name not in policy.tasks:
        raise typer.BadParameter(unknown_name("task type", name, policy.tasks), param_hint=hint)
    return name
