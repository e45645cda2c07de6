"""A child that answers `ping` and needs nothing heavy for it."""

from __future__ import annotations

import os
import sys

from fleetune.child.entry import serve

GATE = "PINGING_CHILD_GATE"
"""Names a FIFO; where it is set, nothing is answered before somebody has opened that for writing."""

if __name__ == "__main__":
    if GATE in os.environ:
        open(os.environ[GATE], "rb").close()
    sys.exit(serve({"ping": lambda fields, emit: {"pid": os.getpid()}}))
