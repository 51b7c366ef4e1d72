"""Counters of a gateway. The gateway writes them, metrics read them; no decision depends on them."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class GatewayCounts:
    """`requests` by HTTP status, 499 if the client left first; `calls_open`: running calls."""

    requests: Counter[int] = field(default_factory=Counter[int])
    wrong_keys: int = 0
    joined: int = 0
    calls_open: int = 0
