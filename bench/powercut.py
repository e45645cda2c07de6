"""The power of the coordinator's disk is cut in the middle of a job, again and again: what devices were told must still be there.

The state folder lies on an ext4 of its own in a file, which the kernel is told to shut down as it stands: what was not flushed is lost,
as with a power cut. Needs root. The control runs without flushes and must be caught losing what it had acknowledged.

    python bench/powercut.py --cuts 20 --control 3
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import exact
import sections
from chaos import LOOK_S, STUCK_S
from exact import AGENTS, OPTIONS, PATH_ROUNDS, Bench, Outcome
from fleet import Fleet

from fleetune.errors import ConfigError

DISK_MIB = 96
ROUNDS = 150
RUN_MAX_S = 0.6
"""From the first update after a start to the cut."""

_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN"""

_WITHOUT_LOG_FLUSH = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH: what ext4 has not written yet, its journal included, is never written."""


class Disk:
    """An ext4 in a file, mounted where the coordinator's state lies."""

    def __init__(self, image: Path, place: Path) -> None:
        self._image = image
        self._place = place
        place.mkdir(parents=True)
        with image.open("wb") as file:
            file.truncate(DISK_MIB << 20)
        _run("mkfs.ext4", "-q", str(image))

    def mount(self) -> None:
        # -w: or a device that another mount is just giving back would be taken read-only, without a word.
        _run("mount", "-w", "-o", "loop", str(self._image), str(self._place))

    def cut(self) -> None:
        fd = os.open(self._place, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        deadline_s = time.monotonic() + 10
        while subprocess.run(["umount", str(self._place)], capture_output=True, check=False).returncode:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{self._place} cannot be unmounted")
            time.sleep(0.05)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr.strip()}")


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """Mounted at the place of the coordinator's state in `folder`; unmounted at the end, whatever happened."""
    made = Disk(folder / "disk.img", folder / "coordinator")
    made.mount()
    try:
        yield made
    finally:
        subprocess.run(["umount", "-l", str(folder / "coordinator")], capture_output=True, check=False)


def unusable(folder: Path) -> str:
    """Why power cannot be cut here; empty where it can."""
    if os.geteuid() != 0:
        return "only root can mount a disk"
    if shutil.which("mkfs.ext4") is None or shutil.which("mount") is None:
        return "mkfs.ext4 and mount are not installed"
    place = Path(tempfile.mkdtemp(prefix="fleetune-probe-", dir=folder))
    try:
        with disk(place) as probe:
            probe.cut()
    except (RuntimeError, OSError) as error:
        return f"a disk cannot be mounted and shut down here: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return ""


async def cuts(folder: Path, wanted: int, seed: int, *, flushes: bool = True) -> Outcome:
    """`wanted` cuts within jobs; without `flushes` those of the coordinator do nothing, and the first loss ends the run."""
    outcome, rng = Outcome("power cuts" if flushes else "power cuts without flushes"), random.Random(seed)
    if not flushes and (reason := exact.unusable()):
        raise RuntimeError(reason)
    with disk(folder) as power:
        async with Fleet(folder, AGENTS, options=OPTIONS) as fleet:
            bench = Bench(fleet, folder, 0.1, outcome, ROUNDS)
            await bench.prepare()
            while outcome.faults < wanted:
                await bench.another(PATH_ROUNDS)
                fleet.before = () if flushes else _WITHOUT_FLUSHES
                await fleet.start_coordinator()
                fleet.before = ()
                await _under_way(bench)
                await asyncio.sleep(rng.uniform(0.0, RUN_MAX_S))
                power.cut()
                fleet.kill_coordinator()
                power.unmount()
                power.mount()
                outcome.faults += 1
                try:
                    bench.judge(folders=False)
                    if flushes:
                        # What may be missing after a cut is written again by the next start; what was cleared away and came
                        # back goes with the next rounds.
                        committed = bench.ledger.committed(bench.job_id)
                        await fleet.start_coordinator()
                        await bench.until(lambda: bench.ended or bench.ledger.committed(bench.job_id) >= committed + PATH_ROUNDS)  # noqa: B023
                        whole = not bench.ended
                        fleet.kill_coordinator()
                        bench.judge(folders=whole)
                except ConfigError as error:
                    outcome.wrong_ends.append(str(error))
                if not flushes and outcome.missed:
                    return outcome
            await fleet.start_coordinator()
            await bench.finish()
        bench.judge()
    return outcome


async def _under_way(bench: Bench) -> None:
    """Until a device was told that its update counts, or the job has ended."""
    before, deadline_s = bench.ledger.accepted(), time.monotonic() + STUCK_S
    while bench.ledger.accepted() == before and not bench.ended:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"no update was accepted within {STUCK_S:g} s of a restart")
        await asyncio.sleep(LOOK_S)


_WITHOUT_FLUSHES = (
    *("strace", "-D", "-f", "-q", "-o", "/dev/null", "--seccomp-bpf", "-e", "trace=fsync,fdatasync"),
    *("-e", "inject=fsync,fdatasync:retval=0"),
)


def text(outcome: Outcome, control: Outcome | None) -> str:
    """What came of it, in a few lines."""
    lines = [
        f"{outcome.faults} {outcome.mode}, {AGENTS} agents, in {outcome.took_s:.0f} s; load of the machine {outcome.load:.1f} at the end",
        f"  history  {len(outcome.violations)} violations after every one of them; {outcome.receipts} receipts of devices looked up",
        f"  jobs     {outcome.jobs} of {ROUNDS} rounds, {outcome.jobs - outcome.differing} with the undisturbed one's bytes",
        *(f"  MISSED {words}" for words in outcome.missed),
    ]
    lines.insert(2, f"  folders  {outcome.folders} of rounds were left without some file, and were whole after the next start")
    if control is not None:
        found = control.missed
        lines.append(
            f"  control  without flushes: {f'caught, {len(found)} violations' if found else 'NOT CAUGHT'} after {control.faults} cuts"
        )
        lines += [f"           {words}" for words in found[:2]]
    return "\n".join(lines)


def section(outcome: Outcome, control: Outcome | None, command: str) -> str:
    """Markdown for docs/benchmarks.md."""
    lines = [
        "## Power cuts",
        "",
        "The coordinator's state lies on an ext4 that the kernel shuts down without flushing (EXT4_IOC_SHUTDOWN) in the middle of `echo`",
        "jobs; it is mounted again and judged against the receipts that the devices got, and judged once more after the next start, which",
        "writes the folders of rounds again. The control has every flush of the coordinator do nothing.",
        "",
        sections.measured(command),
        "",
        "```",
        text(outcome, control),
        "```",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every promise was kept, and the control was caught."""
    given_words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=20, metavar="N", help="of the power")
    parser.add_argument("--control", type=int, default=0, metavar="N", help="at most so many cuts without flushes; needs strace")
    parser.add_argument("--seed", type=int, default=0, help="of the instants; a random one if 0")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    given = parser.parse_args(given_words)
    given.seed = given.seed or random.SystemRandom().randrange(1, 2**31)
    if reason := unusable(given.folder):
        parser.error(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"seed {given.seed}", flush=True)
    found: list[Outcome] = []
    try:
        for flushes, wanted in ((True, given.cuts), (False, given.control)):
            if not wanted:
                continue
            place, started_s = Path(tempfile.mkdtemp(prefix="fleetune-powercut-", dir=given.folder)), time.monotonic()
            try:
                found.append(asyncio.run(cuts(place, wanted, given.seed, flushes=flushes)))
            finally:
                shutil.rmtree(place, ignore_errors=True)
            found[-1].took_s, found[-1].load = time.monotonic() - started_s, os.getloadavg()[0]
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    outcome, control = found[0], found[1] if len(found) > 1 else None
    print(text(outcome, control))
    if given.json is not None:
        given.json.write_text(json.dumps([{**asdict(one), "missed": one.missed} for one in found], indent=2) + "\n", encoding="utf-8")
    if given.write:
        sections.put("powercut", section(outcome, control, " ".join(["python bench/powercut.py", *given_words])))
    return 1 if outcome.missed or (control is not None and not control.missed) else 0


if __name__ == "__main__":
    sys.exit(main())
