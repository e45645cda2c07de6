"""Many rounds on one fleet: whether anything grows that should not.

python bench/soak.py --rounds 2000
python bench/soak.py --rounds 60 --agents 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import meters
import sections
from chaos import JOIN_S, LOOK_S, STUCK_S, Ledger
from fleet import Fleet

KIB = 1 << 10
GROWTH_MAX = 0.05
"""Of the last quarter of the rounds over the second."""

DESCRIPTORS_SLACK = 3
"""A transfer that is under way when it is looked."""

THREADS_SLACK = 1
FILES_SLACK = 2


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    round_number: int
    anon_bytes: int
    descriptors: int
    threads: int
    files: int
    """That are to go again: uploads under way, scratch, results without a receipt."""


@dataclass
class Outcome:
    """What was seen of each process, in the order of the rounds."""

    rounds: int
    agents: int
    took_s: float = 0.0
    completed: bool = False
    samples: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])

    def quarter(self, name: str, number: int, what: str) -> list[int]:
        """Figures of a process in one of the four quarters of the rounds that were seen, counted from 1.

        Where this process was held up, the next rounds were over before it looked again: no quarter is empty for that.
        """
        seen = self.samples[name]
        return [int(getattr(sample, what)) for sample in seen[(number - 1) * len(seen) // 4 : number * len(seen) // 4]]

    def median(self, name: str, number: int, what: str) -> float:
        return statistics.median(self.quarter(name, number, what) or [0])

    def growth(self, name: str) -> float:
        """Of the memory, from the second quarter to the last."""
        return self.median(name, 4, "anon_bytes") / max(1.0, self.median(name, 2, "anon_bytes")) - 1

    @property
    def leaks(self) -> list[str]:
        """What grew of that which is counted."""
        found: list[str] = [] if self.completed else ["the job did not complete"]
        for name in self.samples:
            for what, slack in (("descriptors", DESCRIPTORS_SLACK), ("threads", THREADS_SLACK), ("files", FILES_SLACK)):
                before, after = self.median(name, 2, what), self.median(name, 4, what)
                if after > before + slack:
                    found.append(f"{name}: {what} grew from {before:g} to {after:g}")
        return found

    @property
    def missed(self) -> list[str]:
        grown = [f"{name}: memory grew by {self.growth(name):.1%}" for name in self.samples if self.growth(name) > GROWTH_MAX]
        return self.leaks + grown


def look(pid: int, round_number: int, places: Sequence[Path]) -> Sample | None:
    """None where the process has ended."""
    memory = meters.memory(pid)
    if memory is None:
        return None
    files = sum(1 for place in places if place.is_dir() for path in place.iterdir() if not path.name.startswith("outbox.sqlite"))
    return Sample(round_number, memory.anon, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), files)


async def soak(rounds: int, agents: int, mib: float, folder: Path) -> Outcome:
    """One job of so many rounds, looked at after every one of them that is seen."""
    outcome = Outcome(rounds, agents)
    async with Fleet(folder, agents, options=("--lease-s", "60")) as fleet:
        async with fleet.client() as client:
            deadline_s = time.monotonic() + JOIN_S
            while (await client.server_info()).devices_online < agents:
                fleet.check()
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"not all of {agents} agents joined within {JOIN_S:g} s")
                await asyncio.sleep(0.05)
            job_id = await client.submit(
                f'name = "soak"\n[method]\nname = "echo"\nstate_mib = {mib:g}\n'
                f"[rounds]\ncount = {rounds}\nquorum = 1.0\n[devices]\nminimum = {agents}\n"
            )
        ledger, started_s = Ledger(fleet.state_dir), time.monotonic()
        processes = {"coordinator": (fleet.coordinator, [fleet.state_dir / "spool", fleet.state_dir / "scratch"])}
        for number, pid in enumerate(fleet.agents):
            processes[f"agent {number}"] = (pid, [fleet.log_of(number).with_suffix("") / "outbox"])
        seen, moved_s = 0, time.monotonic()
        while seen < rounds:
            fleet.check()
            committed = ledger.committed(job_id)
            if committed == seen:
                if time.monotonic() - moved_s > STUCK_S:
                    raise RuntimeError(f"no round after {seen} of {rounds} was committed within {STUCK_S:g} s")
                await asyncio.sleep(LOOK_S)
                continue
            seen, moved_s = committed, time.monotonic()
            for name, (pid, places) in processes.items():
                if (sample := look(pid, seen, places)) is not None:
                    outcome.samples.setdefault(name, []).append(sample)
        outcome.took_s = time.monotonic() - started_s
        # The last round's commit is the job's end: what follows is its folder only.
        outcome.completed = ledger.status(job_id) == "completed"
    return outcome


def text(outcome: Outcome) -> str:
    """What was seen, a line a process."""
    lines = [
        f"{outcome.rounds} rounds, {outcome.agents} agents, in {outcome.took_s:.0f} s; medians of the second and of the last quarter",
        f"  {'':12} {'RssAnon, KiB':>22} {'':8} {'descriptors':>12} {'threads':>10} {'files':>8}",
    ]
    for name in outcome.samples:
        pairs = [
            " -> ".join(f"{outcome.median(name, number, what):g}" for number in (2, 4)) for what in ("descriptors", "threads", "files")
        ]
        memory = " -> ".join(f"{outcome.median(name, number, 'anon_bytes') / KIB:.0f}" for number in (2, 4))
        lines.append(f"  {name:12} {memory:>22} {outcome.growth(name):+8.1%} {pairs[0]:>12} {pairs[1]:>10} {pairs[2]:>8}")
    return "\n".join([*lines, *(f"  MISSED {words}" for words in outcome.missed)])


def section(outcome: Outcome, command: str) -> str:
    """Markdown for docs/benchmarks.md."""
    head = "Real coordinator and agents, one `echo` job, every process looked at after each round. More than 5 % of memory would be a leak."
    return "\n".join(["## Soak: many rounds", "", head, "", sections.measured(command), "", "```", text(outcome), "```"])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing grew."""
    given_words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500, help="of the job")
    parser.add_argument("--agents", type=int, default=8, help="agent processes")
    parser.add_argument("--mib", type=float, default=0.1, help="size of the state in MiB")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    given = parser.parse_args(given_words)
    if given.rounds < 8:
        parser.error("--rounds is at least 8: quarters are compared")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = Path(tempfile.mkdtemp(prefix="fleetune-soak-", dir=given.folder))
    try:
        outcome = asyncio.run(soak(given.rounds, given.agents, given.mib, place))
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(text(outcome))
    if given.json is not None:
        found = {**asdict(outcome), "leaks": outcome.leaks, "missed": outcome.missed}
        given.json.write_text(json.dumps(found) + "\n", encoding="utf-8")
    if given.write:
        sections.put("soak", section(outcome, " ".join(["python bench/soak.py", *given_words])))
    return 1 if outcome.missed else 0


if __name__ == "__main__":
    sys.exit(main())
