"""The part of `tollbook credit` for prepaid balances: budgets with window `total`."""

import json
from typing import TYPE_CHECKING, Any

import typer

from tollbook.cli.moments import parse_since
from tollbook.cli.money import check_amount, confirm, run_signed, tell, usd
from tollbook.cli.options import data_settings
from tollbook.cli.user_ids import plain_ids
from tollbook.views.queries import utc_column

if TYPE_CHECKING:
    from tollbook.inference.administration import Administration
    from tollbook.ledger.signature import Signature


def check_options(
    user: str | None, amount: str | None, period: str | None, key: str | None, credit_id: str | None
) -> None:
    """Refuse options that do not go with --budget. Errors: typer.BadParameter."""
    given = {"USER": user, "AMOUNT": amount, "--period": period, "--key": key}
    for hint, value in given.items():
        if value is not None:
            instead = {"AMOUNT": "give --usd", "--key": "--id is the idempotency key"}.get(hint, "use --value")
            raise typer.BadParameter(f"cannot be combined with --budget: {instead}", param_hint=hint)
    if credit_id is None:
        raise typer.BadParameter("missing: the id of the credit, such as the payment's", param_hint="--id")


def check_no_options(value: str | None, amount: str | None, credit_id: str | None, expires: str | None) -> None:
    """Refuse options that need --budget. Errors: typer.BadParameter."""
    for hint, given in {"--value": value, "--usd": amount, "--id": credit_id, "--expires": expires}.items():
        if given is not None:
            raise typer.BadParameter("only with --budget", param_hint=hint)


def grant(
    budget: str, value: str | None, amount: str | None, credit_id: str, expires: str | None, author: str | None,
    reason: str | None, *, yes: bool, as_json: bool,
) -> int:  # fmt: skip
    """Grant credit to a budget; return the exit code. Errors: typer.BadParameter; as `run_signed`."""
    from tollbook.inference.prepaid import Credit
    from tollbook.ledger.clock import now_ms

    if amount is None:
        raise typer.BadParameter("missing: dollars, for example 50", param_hint="--usd")
    amount_nanousd = check_amount(amount, "--usd", "grant")
    expires_ms = None if expires is None else parse_since(expires, "--expires")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        credit = Credit(budget, value, credit_id, expires_ms)
        is_over = expires_ms is not None and expires_ms <= now_ms()
        try:
            # A repeat of a grant that was made before the expiry is fine.
            if is_over and not await administration.prepaid.is_granted(credit):
                raise typer.BadParameter(
                    f"{expires} is in the past: a credit must expire later", param_hint="--expires"
                )
            confirm(f"credit {credit_id} of {usd(amount_nanousd)} for budget {budget}", amount_nanousd, yes=yes)
            done = await administration.prepaid.grant(credit, amount_nanousd, signature)
        except ValueError as exc:
            raise typer.BadParameter(str(exc), param_hint="--budget") from None
        return _document(budget, value, credit_id, amount_nanousd, is_new=done.is_new)

    done = run_signed(run, author, reason or f"credit {credit_id}")
    return tell(done, f"budget {budget}{_of(value)} has {usd(amount_nanousd)} more", as_json=as_json)


def revoke(
    budget: str, value: str | None, amount: str | None, credit_id: str, author: str | None, reason: str | None,
    key: str | None, *, yes: bool, as_json: bool,
) -> int:  # fmt: skip
    """Take back a budget's credit or a part of it; return the exit code. Errors: as `grant`."""
    from tollbook.inference.prepaid import Credit

    amount_nanousd = 0 if amount is None else check_amount(amount, "--usd", "revoke")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        confirm(f"take back credit {credit_id} of budget {budget}", amount_nanousd, yes=yes)
        try:
            done = await administration.prepaid.revoke(
                Credit(budget, value, credit_id), signature, amount_nanousd=amount_nanousd
            )
        except ValueError as exc:
            raise typer.BadParameter(str(exc), param_hint="--budget") from None
        return _document(budget, value, credit_id, -done.change_nanousd, is_new=done.is_new)

    done = run_signed(run, author, reason or f"credit {credit_id} taken back", key)
    return tell(done, f"budget {budget}{_of(value)} has {usd(done['amount_nanousd'])} less", as_json=as_json)


def list_credits(quoted_budget: str, *, as_json: bool) -> int:
    """List a budget's credits from the projection; return the exit code."""
    from tollbook.app.connect import query_projection
    from tollbook.views.rows import plain_text
    from tollbook.views.tables import Printer, Row, dollars, printable

    moments = ", ".join(utc_column(name) for name in ("granted_at", "expires_at", "expired_at"))
    rows = query_projection(
        data_settings(),
        f"SELECT name, value, credit, granted_usd, revoked_usd, expired_usd, {moments}, author, reason "  # noqa: S608 - quoted.
        f"FROM credits WHERE split_part(name, '~', 1) = {quoted_budget} ORDER BY credits.granted_at, credit",
    )
    plain = plain_ids(data_settings(), (row["value"] for row in rows))
    rows = [dict[str, Any](row, value=plain(row["value"])) for row in rows]
    if as_json:
        typer.echo(json.dumps(rows, default=plain_text))
    elif rows:
        cells = [
            Row(
                [
                    printable(row["value"]),
                    printable(row["credit"]),
                    *(dollars(row[name], None) for name in ("granted_usd", "revoked_usd", "expired_usd")),
                    row["expires_at"] or "never",
                ],
                [f"by {printable(row['author'] or '-')}: {printable(row['reason'] or '-')}"],
            )
            for row in rows
        ]
        Printer().table(("value", "credit", "granted>", "taken back>", "expired>", "expires"), cells, "Credits")
    else:
        typer.echo("no credit was granted")
    return 0


def _document(budget: str, value: str | None, credit_id: str, amount_nanousd: int, *, is_new: bool) -> dict[str, Any]:
    return {
        "budget": budget, "value": value, "id": credit_id, "amount_nanousd": amount_nanousd, "is_new": is_new
    }  # fmt: skip


def _of(value: str | None) -> str:
    return "" if value is None else f" of {value}"
