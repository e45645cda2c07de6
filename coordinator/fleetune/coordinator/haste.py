"""An end of the process that nothing can hold up."""

from __future__ import annotations

import logging
import os
import threading
import time

LOG = logging.getLogger("fleetune.coordinator")


def end_within(seconds: float, code: int) -> None:
    """End this process with `code` after `seconds`, unless it has ended in order before.

    For what cannot go on: a thread that waits for a failing disk would hold an orderly end up for as long as the disk likes. What the
    process holds of the system (locks, sockets, its children's pipes) goes with it.
    """

    def end() -> None:
        time.sleep(seconds)
        LOG.critical("something still waits after_s=%g; the process ends without it", seconds)
        os._exit(code)

    threading.Thread(target=end, name="end in haste", daemon=True).start()
