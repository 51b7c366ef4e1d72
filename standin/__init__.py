"""A local stand-in for OpenRouter, for demos and tests: answers and bills like it, and fails on demand.

It is not OpenRouter: its completions are filler text, and no money is charged. It computes its billing book itself and
takes no price or cost from Tollbook, so that the book and the ledger can be compared.
"""

from tollbook.standin.faults import FAULTS, FaultPlan
from tollbook.standin.scenarios import SCENARIOS
from tollbook.standin.server import StandIn, StandInConfig

__all__ = ["FAULTS", "SCENARIOS", "FaultPlan", "StandIn", "StandInConfig"]
