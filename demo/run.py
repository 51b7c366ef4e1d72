"""Runs the demo: starts server, stand-in, projector and worker, publishes tasks, and proves the results."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tollbook.app.processes import System, open_system
from tollbook.consumers.service import build_worker, serve_worker
from tollbook.demo.proof import prove
from tollbook.demo.summary import Report, make_report
from tollbook.demo.workload import (
    Product,
    Publication,
    User,
    count_users,
    credits_nanousd,
    make_tasks,
    make_users,
    plan_caps_nanousd,
)
from tollbook.inference.cost_lookup import CostLookup
from tollbook.inference.policy_file import POLICY_FILE, PolicyFile
from tollbook.inference.policy_toml import policy_toml
from tollbook.inference.prepaid import Credit, Prepaid
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.reconcile import reconcile
from tollbook.inference.settings import Settings, load_settings
from tollbook.ledger.clock import now_ms
from tollbook.ledger.private_files import make_private_folder
from tollbook.ledger.signature import Signature
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.policy import AlertRule, ProviderRule, default_policy

_PAGE: Final = 200

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Options of the demo: number of tasks, data directory, seed, and a policy file; by default the default policy."""

    tasks: int
    data_dir: Path
    seed: int
    policy: PolicyFile | None = None

    @property
    def product(self) -> Product:
        """The product whose tasks are published."""
        return Product() if self.policy is None else Product.of_file(self.policy)

    @property
    def users(self) -> list[User]:
        """The users who send the tasks."""
        return make_users(count_users(self.tasks), self.seed, self.product)


async def run_demo(options: DemoOptions, progress: Progress) -> Report:
    """Run the demo and return its report. Errors: as `open_system`; RuntimeError if the stand-in fails."""
    make_private_folder(options.data_dir)
    async with stand_in_process(options) as base_url:
        await asyncio.to_thread(_write_policy, options, f"{base_url}/api/v1")
        settings = load_settings(
            # The provider gets plain user ids, so that its bill can be compared with the ledger's users.
            provider_user="plain",
            env_file=None,
            # The demo uses only its own data: it never writes to another system's archive or published copy.
            redis_url=None,
            data_dir=options.data_dir,
            archive_dir=None,
            archive_url=None,
            publish_url=None,
            min_replicas=0,
            openrouter_base_url=f"{base_url}/api/v1",
            dialect="openrouter",
            openrouter_api_key=None,
            policy_file=options.data_dir / POLICY_FILE,
            caps="{}",
            backoff_base_s=0.05,
            backoff_max_s=0.5,
        )
        async with open_system(settings) as system:
            return await _run(system, settings, options, progress, base_url)


async def _run(system: System, settings: Settings, options: DemoOptions, progress: Progress, base_url: str) -> Report:
    await _grant_credits(system, options)
    worker = build_worker(system.runtime, tuple(system.runtime.rules.streams), "demo-worker")
    stop, started = asyncio.Event(), time.monotonic()
    working = asyncio.create_task(serve_worker(system.runtime, worker, stop, redis_url=system.redis_url))
    publishing = asyncio.create_task(_publish(system, options))
    try:
        while (done := worker.finished.total()) < options.tasks:
            progress("tasks", done, options.tasks)
            failed = next((task for task in (working, publishing) if task.done() and task.exception()), None)
            if failed is not None:
                await failed
            await asyncio.sleep(0.1)
        progress("tasks", options.tasks, options.tasks)
        seconds = time.monotonic() - started
    finally:
        stop.set()
        await asyncio.gather(working, publishing, return_exceptions=True)
    progress("folding", 0, 1)
    await fold_all(system)
    async with ProviderClients.from_settings(settings) as providers:
        reconciliation = await reconcile(
            lambda sql: asyncio.to_thread(system.projection.store.query, sql),
            system.runtime.ledger,
            CostLookup(providers, system.runtime.rules),
            author="demo",
        )
    await fold_all(system)
    progress("proving", 0, 1)
    answered = await _answered(system, options.tasks)
    proof = await prove(system, await read_book(base_url), options.tasks, answered)
    return await make_report(
        system.projection.store,
        seconds=seconds,
        statuses={status.value: number for status, number in worker.finished.items()},
        reconciliation=reconciliation,
        proof=proof,
    )


def _write_policy(options: DemoOptions, base_url: str) -> None:
    """Write the demo's policy file, so that no other policy file is used.

    It has no alert receivers, because the spend is made up, and the stand-in replaces every provider.
    """
    if options.policy is not None:
        providers = {name: _stand_in_for(rule, base_url) for name, rule in options.policy.policy.providers.items()}
        policy = options.policy.policy.model_copy(update={"alerts": AlertRule(), "providers": providers})
    else:
        caps = plan_caps_nanousd(options.tasks)
        policy = default_policy({"plans": {plan: {"cap_usd": usd_from_nanousd(cap)} for plan, cap in caps.items()}})
    (options.data_dir / POLICY_FILE).write_text(policy_toml(policy), encoding="utf-8")


def _stand_in_for(rule: ProviderRule, base_url: str) -> ProviderRule:
    source = rule.price_source
    return ProviderRule(
        base_url=base_url,
        dialect="openrouter",
        prices_from=None if source == "models" else source,
        catalogue=rule.catalogue_name,
        prices=rule.prices,
    )


async def _grant_credits(system: System, options: DemoOptions) -> None:
    runtime, policy = system.runtime, system.handle.policy
    prepaid = Prepaid(runtime.ledger, runtime.policies, runtime.user_ids)
    for budget, value, nanousd in credits_nanousd(policy, options.product, options.users, options.tasks):
        credit = Credit(budget, value, f"demo {budget} {value or ''}".strip())
        await prepaid.grant(credit, nanousd, Signature("demo", "credit to begin with"))


def stand_in_prices(file: PolicyFile) -> dict[str, dict[str, str]]:
    """Return the current prices of a policy file in the stand-in's format."""
    now, found = now_ms(), dict[str, dict[str, str]]()
    tables = [provider.prices for provider in file.policy.providers.values()]
    for model, rules in (each for table in (*tables, file.policy.prices) for each in table.items()):
        begun = [rule for rule in rules if (rule.starts_ms or 0) <= now] or list(rules[:1])
        kinds = {"prompt", "completion", "cached", "cache_write", "request"}
        found[model] = begun[-1].model_dump(mode="json", include=kinds, exclude_none=True)
    return found


async def _publish(system: System, options: DemoOptions) -> None:
    """Publish tasks as any client would: plain fields, XADD."""
    page: list[Publication] = []
    for task in make_tasks(options.tasks, options.users, options.seed, options.product):
        page.append(task)
        if len(page) == _PAGE:
            await _add(system, page)
            page = []
    await _add(system, page)


async def _add(system: System, page: list[Publication]) -> None:
    pipe = system.handle.redis.pipeline(transaction=False)
    for task in page:
        pipe.xadd(task.stream, dict(task.fields))  # pyright: ignore[reportArgumentType]
    await pipe.execute()


async def fold_all(system: System) -> None:
    """Wait until every event that is now on the ledger is folded."""
    for keys in system.handle.keys:
        newest: Any = await system.handle.pipeline.execute("XREVRANGE", keys.ledger, "+", "-", "COUNT", 1)
        if newest:
            await system.projection.projector.wait_for(keys.partition, EntryId.parse(newest[0][0].decode()))


async def _answered(system: System, tasks: int) -> int:
    key = system.handle.keys[0].result
    found = 0
    for start in range(0, tasks, 1000):
        names = [key(f"demo-{number}") for number in range(start, min(start + 1000, tasks))]
        found += int(await system.handle.pipeline.execute("EXISTS", *names))
    return found


@asynccontextmanager
async def stand_in_process(options: DemoOptions) -> AsyncGenerator[str]:
    """Start the stand-in as a process of its own and yield its address."""
    faults = Path(__file__).with_name("faults.json")
    further: tuple[str, ...] = ()
    if options.policy is not None and (prices := stand_in_prices(options.policy)):
        path = options.data_dir / "stand-in-prices.json"
        path.write_text(json.dumps(prices), encoding="utf-8")
        further = ("--prices", str(path))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tollbook.standin", "--port", "0", "--seed", str(options.seed), "--faults", str(faults)),
        *("--latency-ms", "20", *further),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        if not line:
            raise RuntimeError("the stand-in for OpenRouter did not start")
        yield json.loads(line)["root_url"]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def read_book(base_url: str) -> dict[str, int]:
    """Return the stand-in's own bill: nano-dollars by user."""
    async with httpx.AsyncClient() as client:
        document = (await client.get(f"{base_url}/standin/book", timeout=30)).json()
    return {user: int(total) for user, total in document["totals"].items()}
