"""A child that answers `ping` and needs nothing heavy for it."""

from __future__ import annotations

import os
import sys

from fleetune.child.entry import serve

if __name__ == "__main__":
    sys.exit(serve({"ping": lambda fields, emit: {"pid": os.getpid()}}))
