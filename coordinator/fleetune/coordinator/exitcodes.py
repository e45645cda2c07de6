"""What the exit status of `fleetune` means, in one table."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit statuses of every verb; docs/cli.md holds the same table and a test compares them."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    JOB_FAILED = 5
    JOB_CANCELLED = 6
    REFUSED = 7
    MACHINE = 8
    UNSOUND = 9
    INFEASIBLE = 10
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.INTERNAL: "internal error: a bug in Fleetune",
    ExitCode.USAGE: "usage error or invalid job file",
    ExitCode.UNREACHABLE: "coordinator unreachable",
    ExitCode.NOT_FOUND: "no such job, device, round or log",
    ExitCode.JOB_FAILED: "the job failed",
    ExitCode.JOB_CANCELLED: "the job was cancelled",
    ExitCode.REFUSED: "refused by the coordinator",
    ExitCode.MACHINE: "this machine cannot do it: port taken, disk full, a package or model missing",
    ExitCode.UNSOUND: "what was checked is not sound",
    ExitCode.INFEASIBLE: "no plan covers every block: the best cover was printed",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
    ExitCode.TERMINATED: "terminated (SIGTERM)",
}


def sentence(*codes: ExitCode) -> str:
    """ "0 done, 3 coordinator unreachable, ..." for a verb's help; internal error and interruption always count in."""
    shown = sorted({ExitCode.OK, ExitCode.INTERNAL, ExitCode.USAGE, ExitCode.INTERRUPTED, *codes})
    return "; ".join(f"{code.value} {MEANINGS[code]}" for code in shown) + "."
