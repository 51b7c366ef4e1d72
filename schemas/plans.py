"""Plans and their caps per billing period."""

from enum import StrEnum
from typing import Final

from tollbook.schemas.money import NANOUSD_PER_USD


class Plan(StrEnum):
    """A subscription plan; it decides the cap of a user's billing period."""

    TRIAL = "trial"
    STARTER = "starter"
    GROWTH = "growth"


CAPS_NANOUSD: Final[dict[Plan, int]] = {
    Plan.TRIAL: 5 * NANOUSD_PER_USD,
    Plan.STARTER: 15 * NANOUSD_PER_USD,
    Plan.GROWTH: 40 * NANOUSD_PER_USD,
}

# A user whose plan is not known has the smallest cap, never none.
DEFAULT_PLAN: Final = Plan.TRIAL
