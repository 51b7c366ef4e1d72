"""How budgets and events are packed into the arguments of the gate's functions."""

from collections.abc import Iterable, Sequence

from tollbook.ledger.gate.requests import AttemptEvent, Baseline, BudgetCap


def pack(budgets: Sequence[BudgetCap], baselines: Sequence[Baseline]) -> Iterable[str]:
    """Yield what the gate weighs: each budget's cap and balance, and the position of that balance."""
    for budget, baseline in zip(budgets, baselines, strict=True):
        yield _budget(budget.name, budget.cap_nanousd, baseline)


def pack_names(names: Sequence[str], baselines: Sequence[Baseline]) -> Iterable[str]:
    """Yield the same without caps, where money only comes back; without baselines the names alone."""
    if not baselines:
        return names
    return (_budget(name, 0, baseline) for name, baseline in zip(names, baselines, strict=True))


def flatten(events: Sequence[AttemptEvent]) -> Iterable[str | int]:
    """Yield the events of attempts, three arguments each."""
    for event in events:
        yield event.type
        yield event.attempt
        yield event.payload


def _budget(name: str, cap_nanousd: int, baseline: Baseline) -> str:
    entry = baseline.position.entry
    return (
        f"{cap_nanousd} {baseline.settled_nanousd} {baseline.held_nanousd} "
        f"{entry.ms} {entry.seq} {baseline.position.seq} {name}"
    )
