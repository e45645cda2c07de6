"""One process at a time for a state_dir: the lock ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO

from fleetune.coordinator.faults import MachineError
from fleetune.errors import ConfigError


@contextlib.contextmanager
def held(state_dir: Path) -> Generator[IO[str]]:
    """Hold the folder, made where it is not there. MachineError where another has it, ConfigError where it cannot be used."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (state_dir / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"state_dir {state_dir} cannot be used: {error.strerror}.", "Name another with --state-dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise MachineError(
                f"state_dir {state_dir} is in use by another coordinator (process {owner}).",
                "Stop that one, or name another with --state-dir.",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file
