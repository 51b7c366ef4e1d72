"""The gate: holds, settlements and corrections, each decided and appended in one step inside Redis."""
