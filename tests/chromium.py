"""The browser for tests of the report and the web view: Debian's Chromium, driven by Playwright."""

import os
import shutil
from typing import Final

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def is_ci() -> bool:
    """Whether a missing browser is an error."""
    return os.environ.get("CI", "").lower() == "true"


def describe_chromium() -> str:
    """One line for pytest's header and summary."""
    if CHROMIUM:
        return f"chromium: {CHROMIUM}"
    what = "FAIL" if is_ci() else "are SKIPPED"
    return f"chromium: not found, so the report's tests in a browser {what} (Debian: apt-get install chromium)"
