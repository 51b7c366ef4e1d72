"""The policy by which this process decides: read from the ledger, and again when the gate has a newer one.

Invariant (G11): route, price bound and budgets of a call come from one `PolicyInForce`, whose version is sent with the
request. The gate refuses any version but its own. So a process is safe even if it missed a change: its next reservation
is refused, it reads the new policy and retries.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeVar

from pydantic import ValidationError

from tollbook.inference.budgets import BudgetPolicy
from tollbook.inference.models import ModelCatalogue
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.ledger.errors import LedgerUnavailable, PolicyChanged, PolicyUnreadable
from tollbook.ledger.gate.policies import StoredPolicy, read_policies
from tollbook.ledger.gate.requests import BudgetCap
from tollbook.ledger.keys import Keys
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.events import PolicyApplied
from tollbook.schemas.identifiers import Window, is_hashed_id, partition_of
from tollbook.schemas.policy import Policy, check_plan, default_policy, digest_of
from tollbook.schemas.problems import as_text, problems_of
from tollbook.schemas.tasks import InvalidTask

T = TypeVar("T")
DEFAULT_PRICE_PROVIDER: Final = "openrouter"
_log = LazyLogger(__name__)


@dataclass(frozen=True)
class PolicyInForce:
    """A version of the ledger's policy. Version 0 is the default policy, of a ledger without a `policy-applied` event.

    `definitions` maps each budget whose current definition began after version 1 to the version in which it began.
    `price_provider` is the provider whose prices are used if the policy has none.
    """

    version: int = 0
    policy: Policy = field(default_factory=default_policy)
    definitions: Mapping[str, int] = field(default_factory=dict[str, int])
    price_provider: str = DEFAULT_PRICE_PROVIDER
    digest: str = ""
    """Digest of the content as on the ledger, where an older program may have written it without newer fields."""
    models: ModelCatalogue = field(default_factory=ModelCatalogue, compare=False)
    """What the provider says about its models; the same object for every version."""
    backfilled: tuple[str, ...] = ()
    """The budgets that this version started with an opening balance of earlier spend."""

    @cached_property
    def prices(self) -> PriceCatalogue:
        """The prices in force."""
        return PriceCatalogue.of_policy(self.policy, provider=self.price_provider, models=self.models)

    def cap_nanousd(self, user_id: str, plan: str) -> int:
        """Return the cap of a user's billing period by the policy, in nano-dollars.

        In the gate, a cap assigned on the ledger takes precedence. Errors: InvalidTask for a plan that this policy does
            not have.
        """
        return self.budgets.cap_of(user_id, check_plan(plan, self.policy))

    @cached_property
    def budgets(self) -> BudgetPolicy:
        """The budgets in force, and the calendar of their windows."""
        return BudgetPolicy(self.policy, self.definitions)

    def budgets_at(self, now_ms: int, attributes: Mapping[str, str]) -> tuple[Window, tuple[BudgetCap, ...]]:
        """Return the budgets of a call, the user's period first, and the window in which all of them are valid.

        `attributes` as for `BudgetPolicy.budgets_at`. Errors: InvalidTask for a plan that this policy does not have;
            LedgerUnavailable for a plain user id if the ledger's ids are hashed.
        """
        check_plan(attributes["plan"], self.policy)
        if self.policy.user_ids == "hashed" and not is_hashed_id(attributes["user"]):
            # The policy came into force after this id was read; a repeat hashes it.
            raise LedgerUnavailable("the ledger's first policy came into force at this moment: try again")  # G10
        return self.budgets.budgets_at(now_ms, attributes)

    def caps_of(self, keys: Iterable[str], *, plan: str) -> tuple[BudgetCap, ...]:
        """Return the budgets of a hold with their current caps.

        A budget that this policy no longer has, or has redefined, limits nothing. Errors: InvalidTask.
        """
        check_plan(plan, self.policy)
        return self.budgets.caps_of(keys, plan=plan)


def policy_in_force(
    stored: StoredPolicy,
    *,
    partition: int = 0,
    price_provider: str = DEFAULT_PRICE_PROVIDER,
    models: ModelCatalogue | None = None,
) -> PolicyInForce:
    """Parse the policy that a partition of the ledger has stored.

    Errors: PolicyUnreadable if it was changed by hand, or written by a newer version of Tollbook.
    """
    models = models or ModelCatalogue()
    if not stored.version and not stored.payload:
        return PolicyInForce(price_provider=price_provider, models=models)
    try:
        applied = PolicyApplied.model_validate_json(stored.payload)
        policy = Policy.model_validate(applied.content)
    except ValidationError as exc:
        raise PolicyUnreadable(partition, as_text(problems_of(exc, Policy))) from None
    digest = digest_of(applied.content)
    if (applied.version, applied.digest, digest) != (stored.version, stored.digest, stored.digest):  # G11
        raise PolicyUnreadable(partition, f"its content does not match the digest of version {stored.version}")
    return PolicyInForce(
        applied.version, policy, applied.definitions, price_provider, digest, models, applied.backfilled
    )


class CurrentPolicy:
    """The ledger's policy as this process knows it, per partition, since a change is applied to one after the other."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Sequence[StoredPolicy]]],
        in_force: Sequence[PolicyInForce],
        *,
        price_provider: str = DEFAULT_PRICE_PROVIDER,
        models: ModelCatalogue | None = None,
    ) -> None:
        """`read` returns the stored policies, by partition; `in_force` has the initial policies."""
        self.models = models or ModelCatalogue()
        self._read = read
        self._in_force = tuple(in_force)
        self._price_provider = price_provider
        self._changed = asyncio.Event()

    @classmethod
    async def of_ledger(
        cls,
        pipeline: CommandPipeline,
        keys: Sequence[Keys],
        *,
        price_provider: str = DEFAULT_PRICE_PROVIDER,
        models: ModelCatalogue | None = None,
    ) -> "CurrentPolicy":
        """Read the policy of a ledger. Errors: LedgerUnavailable; PolicyUnreadable."""
        current = cls(lambda: read_policies(pipeline, keys), (), price_provider=price_provider, models=models)
        await current.refresh()
        return current

    @classmethod
    def fixed(cls, in_force: PolicyInForce) -> "CurrentPolicy":
        """Return a policy that never changes, for a ledger of one partition."""

        async def read() -> Sequence[StoredPolicy]:
            return ()

        return cls(read, (in_force,), models=in_force.models)

    def of(self, user_id: str) -> PolicyInForce:
        """Return the policy in force in a user's partition."""
        return self._in_force[partition_of(user_id, len(self._in_force))]

    @property
    def by_partition(self) -> tuple[PolicyInForce, ...]:
        """The policy of each partition. The policies differ only while a change is half applied."""
        return self._in_force

    @property
    def newest(self) -> PolicyInForce:
        """The newest policy of any partition."""
        return max(self._in_force, key=lambda each: each.version)

    async def refresh(self) -> bool:
        """Read the policy from the ledger again; return whether it has changed in any partition.

        Errors: LedgerUnavailable; PolicyUnreadable.
        """
        stored = await self._read()
        known = {(each.version, each.digest): each for each in self._in_force}
        found: list[PolicyInForce] = []
        for partition, each in enumerate(stored):
            same = known.get((each.version, each.digest))
            if same is None:
                same = policy_in_force(
                    each, partition=partition, price_provider=self._price_provider, models=self.models
                )
                known[each.version, each.digest] = same
            found.append(same)
        before, after = self._versions(self._in_force), self._versions(found)
        if not found or before == after:
            return False
        if self._in_force:
            _log.info("policy.changed", version=max(version for version, _ in after))
        self._in_force = tuple(found)
        self._changed.set()
        self._changed = asyncio.Event()
        return True

    async def wait_for_change(self) -> None:
        """Return when this process has read another policy."""
        await self._changed.wait()

    async def decide(self, user_id: str, step: Callable[[PolicyInForce], Awaitable[T]]) -> T:
        """Take a step by a user's policy in force; repeat it by a newer policy if the gate has one.

        Errors: those of `step`; as `refresh`.
        """
        while True:
            try:
                return await step(self.of(user_id))
            except PolicyChanged:  # G11
                await self.refresh()
            except InvalidTask:
                if not await self.refresh():  # A newer policy may have the name.
                    raise

    async def read_by(self, user_id: str, read: Callable[[PolicyInForce], T]) -> T:
        """Read a task by a user's policy in force; if it is invalid, read it again by a newer policy if there is one.

        Errors: InvalidTask; as `refresh`.
        """
        try:
            return read(self.of(user_id))
        except InvalidTask:
            if not await self.refresh():  # G11
                raise
        return read(self.of(user_id))

    @staticmethod
    def _versions(policies: Sequence[PolicyInForce]) -> list[tuple[int, str]]:
        return [(each.version, each.digest) for each in policies]
