"""Who this device is: an id made once, a name people call it, and a lock so that no two agents claim the same state."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import uuid
from collections.abc import Generator
from pathlib import Path

from fleetune.errors import ConfigError, DiskFullError

ID_FILE = "device-id"
LOCK_FILE = "agent.lock"

NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
NAME_WORDS = "1 to 63 of A-Z a-z 0-9 . _ -"

_ID = re.compile(r"[0-9a-f]{32}")


class StateInUseError(ConfigError):
    """Another agent runs on this state folder."""


def require_name(name: str) -> str:
    """The name itself. Raises ConfigError where it is none."""
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"The device name {name!r} cannot be used; allowed: {NAME_WORDS}.", "Set another `name`.")
    return name


def device_id(state_dir: Path) -> str:
    """This device's id, 32 hex digits: read from its file, or made and written there at the first start.

    Call it under `lock`. Raises ConfigError for a file that holds no id or a folder that cannot be used, DiskFullError without space.
    """
    path = state_dir / ID_FILE
    try:
        text = path.read_bytes()[:256].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return _make_id(path)
    except OSError as error:
        raise _unusable(path, error) from error
    if _ID.fullmatch(text) is None:
        raise ConfigError(
            f"The id file {path} holds {text[:40]!r}; allowed: 32 hex digits.",
            "Restore it from a backup, or remove it: the device then joins as a new one.",
        )
    return text


@contextlib.contextmanager
def lock(state_dir: Path) -> Generator[None, None, None]:
    """Hold the state folder, made here if it is missing, for this process alone. Raises StateInUseError naming the process that has it.

    The lock is the kernel's: it ends with the process however that ends, and children do not inherit it.
    """
    path = state_dir / LOCK_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise _unusable(path, error) from error
            raise _taken(state_dir, descriptor) from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise _unusable(path, error) from error
        yield
    finally:
        # The file stays: removing it would let a third agent lock a new one while a second waits on the old.
        os.close(descriptor)


def _taken(state_dir: Path, descriptor: int) -> StateInUseError:
    pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    holder = f"process {pid}" if pid.isdigit() else "another process"
    return StateInUseError(
        f"The state folder {state_dir} is in use by {holder}, another agent.",
        "Stop that one, or give this agent a state_dir and a name of its own.",
    )


def _make_id(path: Path) -> str:
    made = uuid.uuid4().hex
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, f"{made}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise _unusable(path, error) from error
    return made


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(path: Path, error: OSError) -> ConfigError | DiskFullError:
    if error.errno == errno.ENOSPC:
        return DiskFullError(f"No space left for {path}.", "Free some space there, or set another `state_dir`.")
    reason = error.strerror or str(error)
    return ConfigError(f"{path} cannot be used: {reason}.", "Correct its rights, or set another `state_dir`.")
