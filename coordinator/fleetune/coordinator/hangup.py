"""What SIGHUP means to the coordinator: read the TLS files again, or, where its terminal was closed, end in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Protocol

from fleetune.coordinator import statelock

log = logging.getLogger("fleetune.coordinator")


class Reloading(Protocol):
    """Who reads the files again."""

    def reload(self) -> None: ...


def listen(state_dir: Path, files: Reloading | None, stop: asyncio.Event) -> None:
    """From now on, on the running loop. `files` None: there is nothing to read again. `stop` ends the coordinator."""
    had_terminal = _terminal()

    def hung_up() -> None:
        if had_terminal and not _terminal():
            # The kernel says so with the same signal to whoever was started in a terminal that is no more.
            log.info("the terminal was closed")
            stop.set()
        elif files is None:
            log.info("asked to read the TLS files again, and there are none: this coordinator runs in plaintext")
        else:
            files.reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up)
    try:
        statelock.say_reloads(state_dir)
    except OSError as error:  # then `fleetune ca rotate` says that nobody was told
        log.warning("the lock in %s cannot be written: %s", state_dir, error.strerror)


def _terminal() -> bool:
    """Whether one of the standard streams is a terminal that is there."""
    for number in (0, 1, 2):
        try:
            if os.isatty(number):
                return True
        except OSError:
            continue
    return False
