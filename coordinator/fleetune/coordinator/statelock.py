"""One process at a time for a state_dir, and which: the lock ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO

from fleetune.coordinator.faults import MachineError
from fleetune.errors import ConfigError

FILE = "lock"
RELOADS = "reloads"


@contextlib.contextmanager
def held(state_dir: Path) -> Generator[IO[str]]:
    """Hold the folder, made where it is not there. MachineError where another has it, ConfigError where it cannot be used."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (state_dir / FILE).open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"state_dir {state_dir} cannot be used: {error.strerror}.", "Name another with --state-dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = (file.read().split() or ["unknown"])[0]
            raise MachineError(
                f"state_dir {state_dir} is in use by another coordinator (process {owner}).",
                "Stop that one, or name another with --state-dir.",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


def say_reloads(state_dir: Path) -> None:
    """Note in the lock, which this process holds, that it takes SIGHUP for a wish to read its files again, and not for its end."""
    (state_dir / FILE).write_text(f"{os.getpid()} {RELOADS}\n", encoding="ascii")


def reloading_owner(state_dir: Path) -> int | None:
    """The process that holds the folder, where it lives and reads its files again on SIGHUP; else None."""
    try:
        with (state_dir / FILE).open("r", encoding="ascii") as file:
            words = file.read().split()
            if len(words) != 2 or words[1] != RELOADS or not words[0].isdecimal():
                return None
            try:
                # Shared, so that it meets nobody but the owner; where it is given, the owner has gone and its number may be another's.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(words[0])
    except (OSError, ValueError):
        return None
    return None
