"""python -m benchmarks [--only NAME] [--quick] [--json FILE]: measure, print, exit 1 on a missed target."""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog
import uvloop

from benchmarks import (
    budget_check,
    calls,
    gate,
    gate_checks,
    gateway,
    heavy_query,
    projection,
    replay_speed,
    spend_report,
    verify_speed,
)
from benchmarks.machine import describe_machine, server_version
from benchmarks.measure import Result, Sizes
from benchmarks.report import print_report, write_json

BENCHMARKS: dict[str, Callable[[Path, Sizes], Coroutine[Any, Any, list[Result]]]] = {
    "gate": gate.run,
    "gate_checks": gate_checks.run,
    "calls": calls.run,
    "gateway": gateway.run,
    "projection": projection.run,
    "budget_check": budget_check.run,
    "heavy_query": heavy_query.run,
    "spend_report": spend_report.run,
    "replay": replay_speed.run,
    "verify": verify_speed.run,
}
_DEFAULT_JSON = Path(__file__).parent / "results.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="run this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only check that they run; the figures mean little")
    parser.add_argument("--json", type=Path, default=_DEFAULT_JSON, help="where to write the results")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    sizes = Sizes(is_quick=options.quick)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="tollbook-bench-") as folder:
        machine = describe_machine(uvloop.run(server_version(Path(folder, "version"))))
        for name in options.only or BENCHMARKS:
            sys.stderr.write(f"measuring {name} ...\n")
            results += uvloop.run(BENCHMARKS[name](Path(folder, name), sizes))
    print_report(machine, results)
    write_json(options.json, machine, results, is_quick=options.quick)
    print(f"written to {options.json}")
    return 0 if all(result.is_met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
