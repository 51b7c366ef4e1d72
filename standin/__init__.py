"""A local stand-in for OpenRouter: answers and bills like it, with faults on demand.

It is not OpenRouter: its completions are filler text and its money is play money. It is
for demos and tests. Its billing book is its own, kept apart from everything that
Tollbook computes, so that the two can be compared.
"""

from tollbook.standin.faults import FAULTS, FaultPlan
from tollbook.standin.server import StandIn, StandInConfig

__all__ = ["FAULTS", "FaultPlan", "StandIn", "StandInConfig"]
