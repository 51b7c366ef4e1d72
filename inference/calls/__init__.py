"""One capped, recorded call: bound, hold, attempts, settlement."""
