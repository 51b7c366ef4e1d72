"""What-if: the recorded ledger decided again with other caps, prices or routes.

Pure: no I/O, no clock, no randomness. `docs/auditors/what-if.md` lists the assumptions.
"""

from tollbook.audit.what_if.alternatives import Alternatives, OtherRoute, RecordedCaps
from tollbook.audit.what_if.totals import Account, Outcome, Refusal, Totals
from tollbook.audit.what_if.walk import WhatIf

__all__ = ["Account", "Alternatives", "OtherRoute", "Outcome", "RecordedCaps", "Refusal", "Totals", "WhatIf"]
