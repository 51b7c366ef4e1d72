"""Start a server that ends when the process that started it ends. Linux only; run by path, never imported.

The death signal must be set in the child between fork and exec. Python's `preexec_fn` can do that,
but may deadlock in a process with threads (DuckDB has several). So this small program does it, and
then becomes the server, with the same pid, lock and output.

Arguments: the pid of the parent, the server's binary, the server's arguments.
"""

import ctypes
import os
import signal
import sys
from typing import Final

# From linux/prctl.h. The signal survives exec; it comes when the *thread* that forked ends.
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Set the death signal, and replace this process by the server."""
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # A parent that died before the signal was set sends none.
    if os.getppid() != int(parent):
        sys.exit("the process that started the server has ended")
    os.execv(command[0], command)  # noqa: S606 - No shell is wanted: the arguments are a list.


if __name__ == "__main__":
    main()
