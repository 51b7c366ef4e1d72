"""Pages about the running system (as `tollbook top`) and its health (as `tollbook doctor`)."""

from tollbook.app.findings import Finding
from tollbook.views.top.figures import BudgetFigures, Figures, RedisFigures, SpendFigures, UserFigures
from tollbook.views.top.formats import ago
from tollbook.views.web.parts import (
    Cell,
    Fact,
    Notice,
    Page,
    Row,
    Table,
    Tone,
    count,
    exactly,
    link,
    rows_of,
    sentence,
    used,
)
from tollbook.views.web.visit import Visit

_USERS = 10
_NONE = Cell("-")
_STATES: dict[str, tuple[str, Tone]] = {
    "ok": ("ok", "good"), "skipped": ("not checked", "dim"), "warning": ("look", "warn"), "failed": ("failed", "bad"),
}  # fmt: skip


async def now_page(visit: Visit) -> Page:
    """Show the running system."""
    figures = await visit.sources.figures()
    notices = [Notice(sentence(each.text), "bad" if each.level == "person" else "warn") for each in figures.problems]
    tables = [_users(figures.spend), _budgets(figures.spend), _streams(figures.redis)]
    return Page(
        "Now",
        [_tiles(figures), *tables],
        here="/ui",
        notices=notices,
        freshness=_freshness(figures),
        template="now.html",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _tiles(figures: Figures) -> list[Fact]:
    spend, rates, redis = figures.spend, figures.rates, figures.redis
    facts: list[Fact] = []
    if spend is not None:
        facts += [
            Fact(
                f"Spent in {spend.period}",
                _amount(spend.spent_nanousd, f"{_counted(spend.users, 'user')}, {_counted(spend.calls, 'call')}"),
            ),
            Fact(
                "Held now",
                _amount(spend.held_nanousd, "" if redis is None else f"by {_counted(redis.open_holds, 'call')}"),
            ),
            Fact("Refused", Cell(f"{spend.denied:,}", details=[f"in {spend.period}"])),
        ]
    if rates is not None:
        window = f"in the last {rates.window_s} s"
        facts += [
            Fact("Calls a second", Cell(f"{rates.calls_per_s:,.1f}", details=[f"{rates.finished:,} {window}"])),
            Fact("Spent a minute", _amount(rates.nanousd_per_min, f"{rates.failed:,} failed {window}")),
        ]
    if redis is not None:
        facts.append(Fact("Workers", Cell("many" if redis.workers is None else f"{redis.workers:,}")))
    if spend is not None and spend.lag_events is not None:
        behind = [f"{spend.lag_s:,.1f} s behind"] if spend.lag_events and spend.lag_s is not None else []
        facts.append(Fact("Events not folded", Cell(f"{spend.lag_events:,}", details=behind)))
    return facts


def _amount(nanousd: int, detail: str = "") -> Cell:
    cell = exactly(nanousd, 4)
    return Cell(cell.text, details=[detail] if detail else [])


def _freshness(figures: Figures) -> str:
    parts = ["Redis was not read" if figures.redis is None else f"Redis {ago(figures.redis.age_s)}"]
    if figures.spend is None:
        parts.append("spend was not read")
    elif figures.spend.is_current:
        parts.append("spend now")
    else:
        parts.append(f"spend {ago(figures.spend.age_s)}")
    return ", ".join(parts) + "."


def _users(spend: SpendFigures | None) -> Table:
    columns = ("User", "Plan", "Spent>", "Held>", "Cap>", "Used>", "Refused>", "Calls>")
    users: tuple[UserFigures, ...] = () if spend is None else spend.by_spend[:_USERS]
    rows = rows_of(
        [
            Cell(user.user_id, "id", link("/user", id=user.user_id)),
            Cell(user.plan or "-"),
            exactly(user.spent_nanousd, 4),
            exactly(user.held_nanousd, 4),
            _NONE if user.cap_nanousd is None else exactly(user.cap_nanousd),
            used(user.spent_nanousd, user.cap_nanousd),
            count(user.denied),
            count(user.calls),
        ]
        for user in users
    )
    note = "" if spend is None or spend.users <= len(rows) else f"The first {len(rows)} of {spend.users:,} users."
    return Table("Users by spend", columns, rows, empty="Nobody has spent anything in this period.", note=note)


def _budgets(spend: SpendFigures | None) -> Table:
    budgets: tuple[BudgetFigures, ...] = () if spend is None else spend.budgets
    rows = rows_of(
        [
            Cell(budget.name, "id"),
            Cell(budget.value, "id"),
            exactly(budget.spent_nanousd, 4),
            exactly(budget.cap_nanousd),
            used(budget.spent_nanousd, budget.cap_nanousd),
        ]
        for budget in budgets
    )
    columns = ("Budget", "Value", "Spent>", "Cap>", "Used>")
    empty = "The policy has no further budgets, or nothing was spent in one."
    return Table("Further budgets that are used up most", columns, rows, empty=empty)


def _streams(redis: RedisFigures | None) -> Table:
    rows = rows_of(
        [
            Cell(stream.name, "id"),
            Cell("?", "number") if stream.waiting is None else count(stream.waiting),
            count(stream.pending),
            Cell("-" if stream.oldest_pending_s is None else f"{stream.oldest_pending_s:,.0f} s", "number"),
        ]
        for stream in (() if redis is None else redis.streams)
    )
    note = ""
    if redis is not None:
        note = (
            f"{redis.dead_letters:,} tasks could not be executed. {redis.budgets_waited_for:,} budgets are waited for."
        )
    return Table("Task streams", ("Stream", "Waiting>", "Being worked on>", "Oldest>"), rows, note=note)


async def health_page(visit: Visit) -> Page:
    """Show the checks of everything that stops or endangers calls."""
    findings = await visit.sources.findings()
    failed = sum(finding.state == "failed" for finding in findings)
    warned = sum(finding.state == "warning" for finding in findings)
    if failed:
        notice = Notice(f"{failed} of {len(findings)} checks failed: calls are stopped or endangered.", "bad")
    elif warned:
        notice = Notice(f"Calls can be made. {warned} of {len(findings)} checks found something to look at.", "warn")
    else:
        notice = Notice("Calls can be made, and nothing endangers them.", "good")
    worst = {"failed": 0, "warning": 1, "ok": 2, "skipped": 3}
    rows = [_finding(each) for each in sorted(findings, key=lambda each: worst[each.state])]
    lead = "The checks of tollbook doctor: everything that stops or endangers calls, and what to do."
    table = Table("Checks", ("Check", "State", "Found"), rows)
    return Page("Health", [table], here="/ui/health", lead=lead, notices=[notice], freshness="Checked just now.")


def _finding(finding: Finding) -> Row:
    text, tone = _STATES[finding.state]
    details = [f"To do: {finding.advice}"] if finding.advice else []
    return Row([Cell(finding.check), Cell(text, "state", tone=tone), Cell(finding.found, details=details)])
