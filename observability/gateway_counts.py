"""What a gateway counts of itself, for metrics to look at. The gateway writes it; nobody decides by it."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class GatewayCounts:
    """`requests` by HTTP status, 499 for those whose client left first; `calls_open` are under way now."""

    requests: Counter[int] = field(default_factory=Counter[int])
    wrong_keys: int = 0
    joined: int = 0
    calls_open: int = 0
