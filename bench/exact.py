"""Faults at exact points of the coordinator's way to the disk: each system call of it, each step of a fold and of a publication.

The program under test is the one that people run: `strace` injects the faults, or its interpreter counts its steps.

    python bench/exact.py --steps            # killed before its 1st, 2nd, ... step on files, from its start to its second round
    python bench/exact.py --calls            # the same with each system call of each thread: SQLite's are among them
    python bench/exact.py --flush-errors 20  # the 1st, 2nd, ... flush fails with EIO
    python bench/exact.py --folds 50         # killed while it folds, and while it publishes
    python bench/exact.py --all --write      # all of that, written to docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import sections
from chaos import LOOK_S, STUCK_S, Ledger
from fleet import Fleet

from fleetune.coordinator.history import reader
from fleetune.coordinator.history.facts import Violation
from fleetune.wire import digests

FOLDER_RULES = ("folder_differs", "manifest_differs", "link_differs")
"""What the next start writes again from the database and the blobs."""

CALLS = ("fsync", "fdatasync", "rename", "link", "unlink", "symlink", "ftruncate", "pwrite64")
FLUSHES = ("fsync", "fdatasync")
STRACE = "strace"
AGENTS = 2
ROUNDS = 40
PATH_ROUNDS = 2
"""Rounds after a start: everything that a round does was done twice then, its clearing up included."""

OPTIONS = ("--lease-s", "60", "--keep-rounds", "3")
EXIT_MAX_S = 2.0
"""From a flush that fails to the end of the process."""

HOOK = Path(__file__).resolve().parent / "steps"

_PLACE = re.compile(r"<[^>]*/(?P<fd>[^/>]+)>|\"[^\"]*/(?P<path>[^/\"]+)\"")
_NAMES = (
    (re.compile(r"^[0-9a-f]{64}$"), "a blob"),
    (re.compile(r"^[0-9a-f]{32}\.part$"), "a blob aside"),
    (re.compile(r"^[0-9a-f]{32}-[0-9a-f]{64}$"), "an upload"),
    (re.compile(r"\.state(\.part)?$"), "a folded state"),
    (re.compile(r"^\.?adapter_model"), "a round's adapter"),
    (re.compile(r"^\.?\d{4}(\.|$)|^rounds$"), "a round's folder"),
    (re.compile(r"^\.?(final|best)"), "a link"),
    (re.compile(r"^prepare-"), "a preparation's scratch"),
    (re.compile(r"^exact-[0-9a-f]{4}$"), "a job's folder"),
)


@dataclass
class Outcome:
    """What came of one mode."""

    mode: str
    faults: int = 0
    points: dict[str, int] = field(default_factory=dict[str, int])
    """Call and what it was about -> how often it was hit."""
    jobs: int = 0
    differing: int = 0
    """Jobs that did not end with the undisturbed one's bytes."""
    receipts: int = 0
    violations: list[Violation] = field(default_factory=list[Violation])
    folders: int = 0
    """Of rounds, that a fault has left without their files."""
    wrong_ends: list[str] = field(default_factory=list[str])
    exit_s: list[float] = field(default_factory=list[float])
    took_s: float = 0.0
    load: float = 0.0
    """Processes that wanted a core in the last minute."""

    def hit(self, point: str) -> None:
        self.points[point] = self.points.get(point, 0) + 1

    @property
    def missed(self) -> list[str]:
        found = [str(violation) for violation in self.violations] + self.wrong_ends
        if not self.faults:
            found.append("no fault was made")
        if self.differing:
            found.append(f"{self.differing} of {self.jobs} jobs did not end with the undisturbed one's bytes")
        if self.exit_s and max(self.exit_s) > EXIT_MAX_S:
            found.append(f"the process lived {max(self.exit_s):.2f} s after a flush had failed, {EXIT_MAX_S:g} s are allowed")
        return found


def unusable() -> str:
    """Why faults cannot be injected here; empty where they can."""
    if shutil.which(STRACE) is None:
        return "strace is not installed"
    probe = [*_strace("/dev/null", "fsync", "error=EIO", 1), sys.executable, "-c", "import os; os.fsync(os.open('.', os.O_RDONLY))"]
    ended = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    return "" if "Input/output error" in ended.stderr else f"strace cannot inject here: {ended.stderr.strip()[-200:]}"


def _strace(log: str, call: str, what: str, number: int) -> tuple[str, ...]:
    """The command that becomes the one after it (-D) and traces it.

    Not with --seccomp-bpf, which would be faster: strace 6.1 delivers signals at the first call only then.
    """
    return (
        *(STRACE, "-D", "-f", "-q", "-y", "-ttt", "-s", "0", "-o", log),
        *("-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}"),
    )


class Bench:
    """A fleet, the undisturbed digest, and jobs one after another."""

    def __init__(self, fleet: Fleet, folder: Path, mib: float, outcome: Outcome, rounds: int = ROUNDS) -> None:
        self.fleet = fleet
        self.trace = folder / "trace"
        self.receipts = folder / "receipts.jsonl"
        self.outcome = outcome
        self.ledger = Ledger(fleet.state_dir)
        self.job_id = ""
        self._mib = mib
        self._rounds = rounds
        self._expected = ""

    async def prepare(self) -> None:
        """Wait for the agents and run the job without a fault."""
        async with self.fleet.client() as client:
            deadline_s = time.monotonic() + STUCK_S
            while (await client.server_info()).devices_online < AGENTS:
                self.fleet.check()
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"not all of {AGENTS} agents joined within {STUCK_S:g} s")
                await asyncio.sleep(0.05)
        await self.submit()
        await self.until(lambda: self.ended)
        self._expected = await self.final()
        if not self._expected:
            why = self.ledger.ask("SELECT json_extract(machine, '$.message') FROM jobs WHERE job_id = ?", self.job_id)
            raise RuntimeError(f"the undisturbed job did not complete: {self.ledger.status(self.job_id)}, {why}")
        await self.submit()
        self.fleet.kill_coordinator()

    async def submit(self) -> None:
        async with self.fleet.client() as client:
            self.job_id = await client.submit(
                f'name = "exact"\n[method]\nname = "echo"\nstate_mib = {self._mib:g}\n'
                f"[rounds]\ncount = {self._rounds}\nquorum = 1.0\n[devices]\nminimum = {AGENTS}\n"
            )

    @property
    def ended(self) -> bool:
        return self.ledger.status(self.job_id) in ("completed", "failed", "cancelled")

    @property
    def left(self) -> int:
        """Rounds of the present job that are not committed."""
        return self._rounds - self.ledger.committed(self.job_id)

    def phase(self) -> str:
        """Of the open round; empty between rounds."""
        return str(self.ledger.ask("SELECT json_extract(machine, '$.round.phase') FROM jobs WHERE job_id = ?", self.job_id) or "")

    async def until(self, reached: Callable[[], bool]) -> None:
        """RuntimeError where it takes too long, or where a process has ended that nothing was done to."""
        deadline_s = time.monotonic() + STUCK_S
        while not reached():
            if not self.fleet.before:
                self.fleet.check()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"nothing happened within {STUCK_S:g} s (job {self.job_id}, round {self.ledger.committed(self.job_id)})")
            await asyncio.sleep(LOOK_S)

    async def final(self) -> str:
        """Digest of the final adapter; empty where the job did not complete."""
        file = self.fleet.state_dir / "jobs" / self.job_id / "final" / "adapter_model.safetensors"
        if self.ledger.status(self.job_id) != "completed":
            return ""
        await self.until(file.is_file)
        return digests.of_file(file)

    async def another(self, rounds: int) -> None:
        """See to it that a job with at least so many rounds to go lies there; the coordinator is down before and after."""
        while self.left < rounds:
            await self.fleet.start_coordinator()
            await self.finish()
            await self.submit()
            self.fleet.kill_coordinator()

    async def finish(self) -> None:
        await self.until(lambda: self.ended)
        self.outcome.jobs += 1
        self.outcome.differing += await self.final() != self._expected

    async def start(self) -> bool:
        """False where the coordinator ended before it was ready."""
        try:
            await self.fleet.start_coordinator()
        except RuntimeError:
            if self.fleet.exit_code is None:
                raise
            return False
        return True

    def judge(self, *, folders: bool = True) -> None:
        """The history checker on what the last fault has left; without `folders`, those of rounds are only counted where they differ."""
        with self.receipts.open("w", encoding="utf-8") as file:
            told = [found for number in range(AGENTS) for found in _receipts(self.fleet.log_of(number))]
            file.writelines(json.dumps({"task_id": task_id, "digest": "", "status": status}) + "\n" for task_id, status in told)
        self.outcome.receipts = len(told)
        found = reader.examine(self.fleet.state_dir, self.receipts)
        self.outcome.violations += [violation for violation in found if folders or violation.rule not in FOLDER_RULES]
        self.outcome.folders += len({(violation.job_id, violation.round_number) for violation in found if violation.rule in FOLDER_RULES})

    async def doomed(self, before: Sequence[str], kind: str = "?") -> int | None:
        """Start with the fault in place; the exit code, or None (and it is killed) where it lived through its rounds.

        `kind` is that of the call that is hit, for a process that was gone before its tracer could ask which it was and wrote "???".
        """
        self.trace.unlink(missing_ok=True)
        self.fleet.before = tuple(before)
        committed = self.ledger.committed(self.job_id)
        await self.start()
        await self.until(
            lambda: self.fleet.exit_code is not None or self.ledger.committed(self.job_id) >= committed + PATH_ROUNDS or self.ended
        )
        if (code := self.fleet.exit_code) is not None and before[0] == STRACE:
            await self.until(self._is_traced)
        self.fleet.before = ()
        if code is None:
            self.fleet.kill_coordinator()
            return None
        self.outcome.faults += 1
        trace = self._read_trace()
        hit = [line for line in trace.splitlines() if "(" in line]
        call = re.search(r"(\w+)\(", hit[-1]) if hit else None
        self.outcome.hit(f"{call[1]} of {_about(hit[-1])}" if call else f"{kind} of ?")
        return code

    def _is_traced(self) -> bool:
        """Whether the last line is there: the tracer, no child of ours, may write it after the process that it traced is gone."""
        return re.search(rf"^{self.fleet.coordinator} .*\+\+\+ (?:killed|exited) .*\n", self._read_trace(), re.MULTILINE) is not None

    def _read_trace(self) -> str:
        return self.trace.read_text(encoding="utf-8", errors="replace") if self.trace.exists() else ""


def _receipts(log: Path) -> list[tuple[str, str]]:
    return re.findall(r"receipt task=(\S+) lease=\d+ status=(\w+)", log.read_text(encoding="utf-8", errors="replace"))


def _about(line: str) -> str:
    """What a traced call works on, in words."""
    found = list(_PLACE.finditer(line))
    if not found:
        return "?"
    name = found[-1]["fd"] or found[-1]["path"]
    return next((words for pattern, words in _NAMES if pattern.search(name)), name)


async def steps(folder: Path, step: int, most: int) -> Outcome:
    """Killed before each `step`th step on files that the coordinator's interpreter makes, whichever thread makes it."""
    outcome = Outcome("kills at exact steps")
    async with Fleet(folder, AGENTS, options=OPTIONS) as fleet:
        bench = Bench(fleet, folder, 0.1, outcome)
        await bench.prepare()
        path = os.pathsep.join([str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])])
        for number in range(1, most + 1, step):
            await bench.another(PATH_ROUNDS)
            code = await bench.doomed(["env", f"PYTHONPATH={path}", f"KILL_AT_STEP={number}", f"KILL_LOG={bench.trace}"])
            bench.judge()
            if code is None:
                break
            if code != -signal.SIGKILL:
                outcome.wrong_ends.append(f"code {code} instead of a kill at step {number}")
        await fleet.start_coordinator()
        await bench.finish()
    bench.judge()
    return outcome


async def calls(folder: Path, names: Sequence[str], step: int, most: int) -> Outcome:
    """Killed before each `step`th call of each name, until the coordinator gets through its rounds without reaching one."""
    outcome = Outcome("kills at exact calls")
    async with Fleet(folder, AGENTS, options=OPTIONS) as fleet:
        bench = Bench(fleet, folder, 0.1, outcome)
        await bench.prepare()
        for call in names:
            # The only call with more than some dozens: pages of the write-ahead log, three or more for each commit.
            stride = step if call == "pwrite64" else 1
            for number in range(1, most + 1, stride):
                await bench.another(PATH_ROUNDS)
                code = await bench.doomed(_strace(str(bench.trace), call, "signal=SIGKILL", number), call)
                bench.judge()
                if code is None:
                    break
                if code != -signal.SIGKILL:
                    outcome.wrong_ends.append(f"code {code} instead of a kill at {call} {number}")
        await fleet.start_coordinator()
        await bench.finish()
    bench.judge()
    return outcome


async def flush_errors(folder: Path, wanted: int) -> Outcome:
    """The Nth flush fails with EIO, for each N of both kinds of flush, and from the first again until there were enough."""
    outcome = Outcome("failed flushes")
    async with Fleet(folder, AGENTS, options=OPTIONS) as fleet:
        bench = Bench(fleet, folder, 0.1, outcome)
        await bench.prepare()
        number, reached = 1, True
        while outcome.faults < wanted:
            if not reached:
                number, reached = 1, True
                continue
            reached = False
            for call in FLUSHES:
                if outcome.faults == wanted:
                    break
                await bench.another(PATH_ROUNDS)
                code = await bench.doomed(_strace(str(bench.trace), call, "error=EIO", number), call)
                if code is not None:
                    reached = True
                    if code <= 0:
                        outcome.wrong_ends.append(f"code {code} after flush {number} ({call}) had failed")
                    outcome.exit_s.append(_lived_s(bench.trace))
                elif _is_told(bench.trace, fleet.state_dir):
                    outcome.wrong_ends.append(f"it lived on after flush {number} ({call}) had failed")
                bench.judge()
            number += 1
        await fleet.start_coordinator()
        await bench.finish()
    bench.judge()
    return outcome


def _is_told(trace: Path, state_dir: Path) -> bool:
    """Whether a flush failed whose error anybody hears of. SQLite drops that of the folder in which it begins its log; the coordinator
    flushes that folder once more by itself."""
    failed = [line for line in trace.read_text(encoding="utf-8", errors="replace").splitlines() if "INJECTED" in line]
    return any("fdatasync(" not in line or f"<{state_dir}>" not in line for line in failed)


def _lived_s(trace: Path) -> float:
    """From the first call that was made to fail to the end of the process, by the tracer's clock."""
    lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = next(line for line in lines if "INJECTED" in line)
    return float(lines[-1].split()[1]) - float(failed.split()[1])


async def folds(folder: Path, wanted: int, mib: float, seed: int) -> Outcome:
    """Killed at random instants of a fold and of a publication, in turns; each turn until it has hit what it is meant for."""
    outcome, rng = Outcome("kills during fold and publication"), random.Random(seed)
    fold_s, publish_s = 0.05, 0.01
    async with Fleet(folder, AGENTS, options=OPTIONS) as fleet:
        bench = Bench(fleet, folder, mib, outcome)
        await bench.prepare()
        tries = 0
        while outcome.faults < wanted:
            tries += 1
            if tries > 20 * wanted:
                raise RuntimeError(f"{tries} kills, and only {outcome.faults} of them fell where they were meant to")
            await bench.another(PATH_ROUNDS)
            await fleet.start_coordinator()
            committed = bench.ledger.committed(bench.job_id)
            in_fold = outcome.faults % 2 == 0
            if in_fold:
                begun_s = await _spin(lambda: bench.phase() == "folding")
                await asyncio.sleep(rng.uniform(0.0, fold_s))
            else:
                begun_s = await _spin(lambda: bench.ledger.committed(bench.job_id) > committed)  # noqa: B023 - called before it changes
                await asyncio.sleep(rng.uniform(0.0, publish_s))
            fleet.kill_coordinator()
            # Where it really fell is told by what it has left.
            number = bench.ledger.committed(bench.job_id)
            published = fleet.state_dir / "jobs" / bench.job_id / "rounds" / f"{number:04d}"
            if in_fold:
                point = "while a round was folded" if bench.phase() == "folding" else ""
                if not point:  # a busy machine kills late
                    fold_s /= 2
            elif number > committed and not published.exists():
                point = "after a commit, before its folder was there"
            elif number > committed and time.monotonic() - begun_s < 1.0:
                point = "after a commit, while its clearing up was under way or just over"
            else:
                point = ""
            if point:
                outcome.faults += 1
                outcome.hit(point)
            bench.judge()
        await fleet.start_coordinator()
        await bench.finish()
    bench.judge()
    return outcome


async def _spin(reached: Callable[[], bool]) -> float:
    """As fast as can be, since what is waited for lasts milliseconds; the time by the monotonic clock."""
    deadline_s = time.monotonic() + STUCK_S
    while not reached():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"nothing happened within {STUCK_S:g} s")
        await asyncio.sleep(0)
    return time.monotonic()


def text(outcome: Outcome) -> str:
    """What came of a mode, in a few lines."""
    by_call = Counter[str]()
    for point, count in outcome.points.items():
        by_call[point.partition(" of ")[0]] += count
    lines = [
        f"{outcome.faults} {outcome.mode} in {outcome.took_s:.0f} s",
        f"  history  {len(outcome.violations)} violations after every one of them; {outcome.receipts} receipts of devices looked up",
        f"  jobs     {outcome.jobs} of {ROUNDS} rounds, {outcome.jobs - outcome.differing} with the undisturbed one's bytes",
        f"  points   {len(outcome.points)} kinds: {', '.join(f'{call} {count}' for call, count in by_call.items())}",
        *(f"    {count:4d}  {point}" for point, count in sorted(outcome.points.items())),
    ]
    if outcome.exit_s:
        lines.append(f"  ended    p50 {statistics.median(outcome.exit_s):.3f} s, max {max(outcome.exit_s):.3f} s after the failed flush")
    return "\n".join([*lines, *(f"  MISSED {words}" for words in outcome.missed)])


def section(outcomes: Sequence[Outcome], command: str) -> str:
    """Markdown for docs/benchmarks.md."""
    lines = [
        "## Faults at exact points",
        "",
        "The coordinator is killed before the 1st, 2nd, ... step with which it changes its disk, from its start until two rounds are",
        "committed: *steps* are those of Python, counted over all threads, *calls* are system calls, SQLite's among them, counted in each",
        "thread by `strace`, which also lets flushes fail with EIO. After each fault the history checker judges what is left, the devices'",
        "receipts included, and every job must end with the undisturbed one's bytes.",
        "",
        sections.measured(command),
        f"Load of the machine at the end of each: {', '.join(f'{outcome.load:.1f}' for outcome in outcomes)}.",
        "",
        "| faults | kinds of points | violations | jobs, identical | process ended after, p50 / max | took |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        ended = f"{statistics.median(outcome.exit_s):.3f} / {max(outcome.exit_s):.3f} s" if outcome.exit_s else ""
        lines.append(
            f"| {outcome.faults} {outcome.mode} | {len(outcome.points)} | {len(outcome.violations)} ({outcome.receipts} receipts) "
            f"| {outcome.jobs}, {outcome.jobs - outcome.differing} | {ended} | {outcome.took_s:.0f} s |"
        )
    missed = [f"- {outcome.mode}: {words}" for outcome in outcomes for words in outcome.missed]
    return "\n".join([*lines, *(["", "Missed:", "", *missed] if missed else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="killed at each exact step on files")
    parser.add_argument("--calls", action="store_true", help="killed at each exact system call")
    parser.add_argument("--names", default=",".join(CALLS), help="of the calls")
    parser.add_argument("--step", type=int, default=1, help="every such step or pwrite64; all other calls are hit one by one")
    parser.add_argument("--most", type=int, default=400, help="of one call")
    parser.add_argument("--flush-errors", type=int, default=0, metavar="N", help="flushes that fail")
    parser.add_argument("--folds", type=int, default=0, metavar="N", help="kills during fold and publication")
    parser.add_argument("--mib", type=float, default=16.0, help="size of the state that is folded, in MiB")
    parser.add_argument("--all", action="store_true", help="all steps and calls, 20 and 50 of them")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    parser.add_argument("--seed", type=int, default=0, help="of the instants; a random one if 0")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--keep", action="store_true", help="leave the files of a run in which something was missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(words)
    given.seed = given.seed or random.SystemRandom().randrange(1, 2**31)
    if given.all:
        given.steps, given.calls, given.flush_errors, given.folds = True, True, 20, 50
    if not (given.steps or given.calls or given.flush_errors or given.folds):
        parser.error("name --steps, --calls, --flush-errors, --folds or --all")
    if (given.calls or given.flush_errors) and (reason := unusable()):
        parser.error(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"seed {given.seed}", flush=True)
    modes: list[Callable[[Path], Coroutine[None, None, Outcome]]] = [
        *([lambda place: steps(place, given.step, given.most)] if given.steps else []),
        *([lambda place: calls(place, given.names.split(","), given.step, given.most)] if given.calls else []),
        *([lambda place: flush_errors(place, given.flush_errors)] if given.flush_errors else []),
        *([lambda place: folds(place, given.folds, given.mib, given.seed)] if given.folds else []),
    ]
    outcomes: list[Outcome] = []
    try:
        for mode in modes:
            place = Path(tempfile.mkdtemp(prefix="fleetune-exact-", dir=given.folder))
            kept, started_s = given.keep, time.monotonic()
            try:
                outcome = asyncio.run(mode(place))
                kept = given.keep and bool(outcome.missed)
            finally:
                if kept:
                    print(f"files: {place}")
                else:
                    shutil.rmtree(place, ignore_errors=True)
            outcome.took_s, outcome.load = time.monotonic() - started_s, os.getloadavg()[0]
            print(text(outcome), flush=True)
            outcomes.append(outcome)
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    if given.json is not None:
        found = [{**asdict(outcome), "missed": outcome.missed} for outcome in outcomes]
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if given.write:
        seed = [] if "--seed" in words else ["--seed", str(given.seed)]
        sections.put("exact", section(outcomes, " ".join(["python bench/exact.py", *words, *seed])))
    return 1 if any(outcome.missed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
