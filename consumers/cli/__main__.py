"""`python -m consumers.cli` is `tollbook`."""

from consumers.cli import main

main()
