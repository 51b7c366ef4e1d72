"""Finds problems in the figures: those that need a person, and notices; each with what to do."""

from collections.abc import Iterator

from tollbook.views.top.figures import Figures, Problem, RedisFigures, SpendFigures

_LATE_S = 10.0


def find_problems(figures: Figures, *, is_answered: bool) -> tuple[Problem, ...]:
    """Return the problems, those for a person first. `is_answered`: Redis answered just now."""
    found = [*_of_redis(figures.redis, is_answered=is_answered), *_of_spend(figures.spend)]
    if figures.redis is not None and figures.spend is not None and figures.redis.ledger_id != figures.spend.ledger_id:
        text = f"Redis has another ledger than the one folded in {figures.data_dir}: `tollbook doctor`"
        found.append(Problem("person", text))
    return tuple(sorted(found, key=lambda problem: problem.level != "person"))


def _of_redis(redis: RedisFigures | None, *, is_answered: bool) -> Iterator[Problem]:
    if redis is None:
        return
    # If the server accepts no writes, processes cannot show that they are alive, so missing signs mean nothing.
    is_answered = is_answered and redis.refusal is None
    if redis.refusal is not None:
        yield Problem("person", redis.refusal)
    elif redis.unsynced is not None:
        yield Problem("notice", redis.unsynced)
    if redis.stopped is not None:
        yield Problem("person", f"calls are stopped: {redis.stopped}")
    elif is_answered and redis.projector is None:
        yield Problem("person", "no projector runs, so calls wait: start `tollbook up` or `tollbook projector`")
    if is_answered and redis.workers == 0:
        has_work = redis.pending or any(stream.waiting for stream in redis.streams)
        yield Problem("person" if has_work else "notice", "no worker runs: start `tollbook up` or `tollbook worker`")
    if redis.dead_letters:
        tasks = "1 task" if redis.dead_letters == 1 else f"{redis.dead_letters:,} tasks"
        yield Problem("person", f"{tasks} could not be executed: `tollbook dead-letters list`")
    for receiver in redis.failing_receivers:
        yield Problem("person", f"alerts are not delivered to {receiver}: `tollbook alerts test`")


def _of_spend(spend: SpendFigures | None) -> Iterator[Problem]:
    if spend is None:
        return
    if spend.discrepancies:
        events = "1 event" if spend.discrepancies == 1 else f"{spend.discrepancies:,} events"
        yield Problem("person", f"gate and fold disagree ({events}): `tollbook doctor`")
    if spend.lag_s is not None and spend.lag_s > _LATE_S:
        yield Problem("notice", f"the projector is {spend.lag_s:,.0f} s behind the ledger")
