"""What can go wrong for an operator, and the exit code of each."""

from __future__ import annotations

from fleetune.coordinator.exitcodes import ExitCode
from fleetune.errors import ConfigError, DiskFullError, FleetuneError, ModelError, UnreachableError, UnsupportedError


class NotFoundError(FleetuneError):
    """The coordinator has no such job, device, round or blob."""


class RefusedError(FleetuneError):
    """The coordinator understood and said no."""


class CoordinatorFaultError(FleetuneError):
    """The coordinator failed while it answered: a bug there."""


class FolderInUseError(FleetuneError):
    """An export or a demo would write into a folder that holds something."""


class MachineError(FleetuneError):
    """This machine cannot do it now: a process of ours died, a port is taken, a file cannot be written."""


_CODES: tuple[tuple[type[FleetuneError], ExitCode], ...] = (
    (UnreachableError, ExitCode.UNREACHABLE),
    (NotFoundError, ExitCode.NOT_FOUND),
    (RefusedError, ExitCode.REFUSED),
    (ConfigError, ExitCode.USAGE),
    (FolderInUseError, ExitCode.USAGE),
    (MachineError, ExitCode.MACHINE),
    (DiskFullError, ExitCode.MACHINE),
    (UnsupportedError, ExitCode.MACHINE),
    (ModelError, ExitCode.MACHINE),
)


def exit_code(error: FleetuneError) -> ExitCode:
    """The exit code of an error; what no row names is a bug somewhere and INTERNAL."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.INTERNAL)
