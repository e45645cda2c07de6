"""Starts a program that ends when its parent does, even if the parent was killed outright."""

# Run by its path with `python -I -S`, before the real program takes over the process: PR_SET_PDEATHSIG survives exec. Setting it
# in subprocess's preexec_fn instead would run Python between fork and exec in a process that has grpc's threads.

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """argv: the parent's process id, then the program and its arguments."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            # It died before the call above: no signal will come any more.
            sys.exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
