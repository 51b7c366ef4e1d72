"""The `tollbook` command. Bad input or a failed step ends in one clear line and a non-zero exit code."""

import sys


def main() -> None:
    """Run the command line; the only place where an unexpected error becomes an exit code."""
    # Imported here, so that `import tollbook.cli` does nothing.
    from tollbook.cli.app import run

    sys.exit(run())
