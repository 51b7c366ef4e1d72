"""This machine's clock. It is read in composition roots only, and handed down."""

import time


def now_ms() -> int:
    """Milliseconds since the epoch by this machine's clock; the gate corrects it by Redis's where it matters."""
    return time.time_ns() // 1_000_000
