"""Kills and cuts in the middle of a job with real processes, and what the history checker says of it afterwards.

Each mode runs an `echo` job undisturbed, then the same job on the same devices under faults spread over its rounds. Both must complete
with the same bytes, and the coordinator's state folder must pass every rule of the history checker, the devices' receipts included.

    python bench/chaos.py --coordinator-kills 20
    python bench/chaos.py --agent-kills 20 --seed 7
    python bench/chaos.py --cuts 10 --cut-mib 20
    python bench/chaos.py --stops 20
    python bench/chaos.py --mixed 30
    python bench/chaos.py --all --write
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import sections
from fleet import Fleet
from proxy import Proxy

from fleetune.coordinator.history import reader
from fleetune.coordinator.history.facts import Violation
from fleetune.wire import chunks, digests

MIB = 1 << 20
LOOK_S = 0.005
JOIN_S = 120.0
STUCK_S = 120.0
"""No round for so long, and the run has failed."""

OPTIONS = ("--lease-s", "60", "--keep-rounds", "3")
"""No device is given up while it comes back: every round has all of them, so that both jobs have one result."""

STARTING_SHARE = 0.15
"""Of the coordinator's kills hit it while it starts."""

ROUNDS_PER_FAULT = 1.5
JOBS_MAX = 20
"""Disturbed ones: where this process is held up while faults are due, a job may be over before all of them were made."""

RESENT_MAX_BYTES = 2 * chunks.CHUNK_BYTES
READY_MAX_S = 5.0
STOPPED_MAX_S = 15.0
"""From SIGTERM to the end: the grace that uploads have, and what closing takes."""

_DRAINING = re.compile(r"draining grace_s=\S+ uploads=(\d+)")
_RECEIVED = re.compile(r"task received task=(\S+) ")
_RECEIPT = re.compile(r"receipt task=(\S+) lease=\d+ status=(\w+)")


@dataclass(frozen=True)
class Plan:
    """What is to be done to which fleet."""

    mode: str
    faults: int
    agents: int
    mib: float
    rounds: int
    seed: int
    plaintext: bool = False


@dataclass
class Outcome:
    """What came of it. Seconds and bytes; each list has one entry for each fault that it was measured at."""

    plan: Plan
    faults: int = 0
    completed: bool = False
    identical: bool = False
    undisturbed_s: float = 0.0
    disturbed_s: float = 0.0
    receipts: int = 0
    trained_again: int = 0
    """Tasks that a device was given more than once."""
    load: float = 0.0
    """Processes that wanted a core in the last minute: far above the number of cores, seconds tell of the others."""
    violations: list[Violation] = field(default_factory=list[Violation])
    ready_s: list[float] = field(default_factory=list[float])
    first_accepted_s: list[float] = field(default_factory=list[float])
    resent_bytes: list[int] = field(default_factory=list[int])
    stopped_s: list[float] = field(default_factory=list[float])
    uploads: int = 0
    """Under way when the coordinator was told to stop, over all stops."""
    wrong_codes: list[int] = field(default_factory=list[int])
    """Of stops that did not end with 0."""

    @property
    def missed(self) -> list[str]:
        """What was promised and not kept, in words."""
        found = [str(violation) for violation in self.violations]
        if not self.completed:
            found.append("the job did not complete")
        if not self.identical:
            found.append("the final adapter differs from the undisturbed run's")
        if self.trained_again and "agent kills" not in self.plan.mode:
            found.append(f"{self.trained_again} tasks were trained again, although their devices lived on")
        if self.faults < self.plan.faults:
            found.append(f"only {self.faults} of {self.plan.faults} faults were made before the job's end")
        if self.ready_s and max(self.ready_s) > READY_MAX_S:
            found.append(f"ready again only after {max(self.ready_s):.2f} s, {READY_MAX_S:g} s are allowed")
        if self.resent_bytes and max(self.resent_bytes) > RESENT_MAX_BYTES:
            found.append(f"{max(self.resent_bytes)} bytes were sent again after a cut, {RESENT_MAX_BYTES} are allowed")
        if self.wrong_codes:
            found.append(f"{len(self.wrong_codes)} stops ended with another code than 0: {self.wrong_codes[:5]}")
        if self.stopped_s and max(self.stopped_s) > STOPPED_MAX_S:
            found.append(f"stopped only after {max(self.stopped_s):.2f} s, {STOPPED_MAX_S:g} s are allowed")
        return found


class Ledger:
    """The coordinator's database as it stands, read beside it."""

    def __init__(self, state_dir: Path) -> None:
        self._place = (state_dir / reader.DATABASE).resolve().as_uri() + "?mode=ro"

    def committed(self, job_id: str) -> int:
        return self._number("SELECT MAX(round) FROM rounds WHERE job_id = ?", job_id)

    def accepted(self) -> int:
        """Grows with every accepted update."""
        return self._number("SELECT MAX(rowid) FROM updates")

    def status(self, job_id: str) -> str:
        return str(self.ask("SELECT status FROM jobs WHERE job_id = ?", job_id) or "")

    def _number(self, question: str, *values: str) -> int:
        found = self.ask(question, *values)
        return found if isinstance(found, int) else 0

    def ask(self, question: str, *values: str) -> object:
        """The first column of the first row; None where there is none."""
        connection = sqlite3.connect(self._place, uri=True, timeout=5)
        try:
            row = connection.execute(question, values).fetchone()
            return row[0] if row else None
        finally:
            connection.close()


class Run:
    """One job on a running fleet."""

    def __init__(self, fleet: Fleet, ledger: Ledger, job_id: str, rounds: int) -> None:
        self.fleet = fleet
        self.ledger = ledger
        self.job_id = job_id
        self.rounds = rounds

    @property
    def ended(self) -> bool:
        return self.ledger.status(self.job_id) in ("completed", "failed", "cancelled")

    async def until_committed(self, rounds: int) -> None:
        """RuntimeError where no round is committed for too long."""
        last, since_s = -1, time.monotonic()
        while (now := self.ledger.committed(self.job_id)) < rounds and not self.ended:
            if now > last:
                last, since_s = now, time.monotonic()
            if time.monotonic() - since_s > STUCK_S:
                raise RuntimeError(f"no round after {now} of {self.rounds} was committed within {STUCK_S:g} s (job {self.job_id})")
            await asyncio.sleep(LOOK_S)

    async def finish(self) -> str:
        """The final adapter's digest; empty where the job did not complete."""
        await self.until_committed(self.rounds)
        final = self.fleet.state_dir / "jobs" / self.job_id / "final" / "adapter_model.safetensors"
        deadline_s = time.monotonic() + STUCK_S
        while not (self.ended and final.is_file()):
            if time.monotonic() > deadline_s:
                return ""
            await asyncio.sleep(LOOK_S)
        return digests.of_file(final) if self.ledger.status(self.job_id) == "completed" else ""


Disturb = Callable[[Run], Awaitable[None]]


async def coordinator_kills(plan: Plan, folder: Path) -> Outcome:
    """The coordinator is killed at random instants and started again at once, on the same port and folder."""
    outcome, rng = Outcome(plan), random.Random(plan.seed)

    async def disturb(run: Run) -> None:
        async for pause_s in _instants(outcome, run, rng, plan.faults - outcome.faults):
            await asyncio.sleep(pause_s)
            run.fleet.kill_coordinator()
            outcome.faults += 1
            if rng.random() < STARTING_SHARE and outcome.faults < plan.faults:
                starting = asyncio.create_task(run.fleet.start_coordinator())
                await asyncio.sleep(rng.uniform(0.0, 0.6))
                # Not awaited to its end: it waits for an address that never comes.
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                run.fleet.kill_coordinator()
                outcome.faults += 1
            before, started_s = run.ledger.accepted(), time.monotonic()
            await run.fleet.start_coordinator()
            outcome.ready_s.append(time.monotonic() - started_s)
            while run.ledger.accepted() == before and not run.ended:
                if time.monotonic() - started_s > STUCK_S:
                    raise RuntimeError(f"no update was accepted within {STUCK_S:g} s of a restart (job {run.job_id})")
                await asyncio.sleep(LOOK_S)
            if not run.ended:
                outcome.first_accepted_s.append(time.monotonic() - started_s)
            if outcome.faults >= plan.faults:  # some of them came in pairs
                return

    async with Fleet(folder, plan.agents, options=OPTIONS, plaintext=plan.plaintext) as fleet:
        await _both(plan, fleet, outcome, disturb)
    return _judged(outcome, fleet, folder)


async def agent_kills(plan: Plan, folder: Path) -> Outcome:
    """A random agent is killed and started again at once."""
    outcome, rng = Outcome(plan), random.Random(plan.seed)

    async def disturb(run: Run) -> None:
        async for pause_s in _instants(outcome, run, rng, plan.faults - outcome.faults):
            await asyncio.sleep(pause_s)
            run.fleet.replace_agent(rng.randrange(plan.agents))
            outcome.faults += 1

    async with Fleet(folder, plan.agents, options=OPTIONS, plaintext=plan.plaintext) as fleet:
        await _both(plan, fleet, outcome, disturb)
    return _judged(outcome, fleet, folder)


async def cuts(plan: Plan, folder: Path) -> Outcome:
    """Once in each round, the connection on which a random byte of the round's uploads comes is cut."""
    outcome, rng = Outcome(plan), random.Random(plan.seed)
    async with Proxy() as proxy, Fleet(folder, plan.agents, options=OPTIONS, route=proxy.open, plaintext=plan.plaintext) as fleet:
        quiet: list[int] = []
        sizes = plan.agents * round(plan.mib * MIB)

        async def watch(run: Run, cutting: bool) -> list[int]:
            """Bytes from agents during each round that were cut, or of each where none is to be."""
            found: list[int] = []
            for number in range(1, plan.rounds + 1):
                before, cuts_before = proxy.up_bytes, proxy.cuts
                if cutting and number <= plan.faults and proxy.cuts < plan.faults:
                    proxy.cut_at(before + rng.randrange(sizes))
                await run.until_committed(number)
                if not cutting or proxy.cuts > cuts_before:
                    found.append(proxy.up_bytes - before)
            return found

        async def measure(run: Run) -> None:
            quiet.extend(await watch(run, cutting=False))

        async def disturb(run: Run) -> None:
            found = await watch(run, cutting=True)
            outcome.faults = proxy.cuts
            outcome.resent_bytes += [max(0, taken - round(statistics.median(quiet))) for taken in found]

        await _both(plan, fleet, outcome, disturb, measure)
    return _judged(outcome, fleet, folder)


async def mixed(plan: Plan, folder: Path) -> Outcome:
    """Random agents are killed and started again, and half as many connections cut, all in one job."""
    outcome, rng = Outcome(plan), random.Random(plan.seed)
    cuts = plan.faults // 3
    killed = 0
    async with Proxy() as proxy, Fleet(folder, plan.agents, options=OPTIONS, route=proxy.open, plaintext=plan.plaintext) as fleet:
        sizes = plan.agents * round(plan.mib * MIB)

        async def kill(run: Run) -> None:
            nonlocal killed
            async for pause_s in _instants(outcome, run, rng, plan.faults - cuts - killed):
                await asyncio.sleep(pause_s)
                run.fleet.replace_agent(rng.randrange(plan.agents))
                killed += 1

        async def cut(run: Run) -> None:
            left = cuts - proxy.cuts
            for index in range(left):
                await run.until_committed(index * (plan.rounds - 1) // left)
                if run.ended:
                    return
                proxy.cut_at(proxy.up_bytes + rng.randrange(sizes))

        async def disturb(run: Run) -> None:
            await asyncio.gather(kill(run), cut(run))
            await run.finish()
            outcome.faults = killed + proxy.cuts

        await _both(plan, fleet, outcome, disturb)
    return _judged(outcome, fleet, folder)


async def stops(plan: Plan, folder: Path) -> Outcome:
    """The coordinator gets SIGTERM while updates are on their way, and is started again once it has ended."""
    outcome, rng = Outcome(plan), random.Random(plan.seed)

    async def disturb(run: Run) -> None:
        async for pause_s in _instants(outcome, run, rng, plan.faults - outcome.faults):
            await asyncio.sleep(pause_s)
            code, took_s = await run.fleet.stop_coordinator()
            outcome.faults += 1
            outcome.stopped_s.append(took_s)
            outcome.wrong_codes += [code] if code else []
            started_s = time.monotonic()
            await run.fleet.start_coordinator()
            outcome.ready_s.append(time.monotonic() - started_s)

    async with Fleet(folder, plan.agents, options=OPTIONS, plaintext=plan.plaintext) as fleet:
        await _both(plan, fleet, outcome, disturb)
        said = (folder / "coordinator.log").read_text(encoding="utf-8", errors="replace")
        outcome.uploads = sum(map(int, _DRAINING.findall(said)))
    return _judged(outcome, fleet, folder)


MODES = {
    "coordinator kills": coordinator_kills,
    "agent kills": agent_kills,
    "link cuts": cuts,
    "coordinator stops": stops,
    "agent kills and link cuts": mixed,
}


async def _both(plan: Plan, fleet: Fleet, outcome: Outcome, disturb: Disturb, measure: Disturb | None = None) -> None:
    """The job undisturbed, then disturbed; fills in what both have in common."""
    async with fleet.client() as client:
        deadline_s = time.monotonic() + JOIN_S
        while (await client.server_info()).devices_online < plan.agents:
            fleet.check()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"not all of {plan.agents} agents joined within {JOIN_S:g} s")
            await asyncio.sleep(0.05)
        ledger = Ledger(fleet.state_dir)
        warm_up = Run(fleet, ledger, await client.submit(_job(plan, 1)), 1)
        await warm_up.finish()  # the first task starts the agents' children
        quiet = Run(fleet, ledger, await client.submit(_job(plan, plan.rounds)), plan.rounds)
        started_s = time.monotonic()
        if measure is not None:
            await measure(quiet)
        expected = await quiet.finish()
        outcome.undisturbed_s = time.monotonic() - started_s
    for _ in range(JOBS_MAX):
        async with fleet.client() as client:
            disturbed = Run(fleet, ledger, await client.submit(_job(plan, plan.rounds)), plan.rounds)
        started_s = time.monotonic()
        await disturb(disturbed)
        found = await disturbed.finish()
        outcome.disturbed_s = time.monotonic() - started_s
        outcome.completed, outcome.identical = bool(found), found == expected and bool(expected)
        if not outcome.identical or outcome.faults >= plan.faults:
            return


async def _instants(outcome: Outcome, run: Run, rng: random.Random, wanted: int) -> AsyncIterator[float]:
    """For each of the `wanted` faults, once its round is under way, how much longer to wait. Ends with the job at the latest."""
    round_s = outcome.undisturbed_s / run.rounds
    last = run.rounds - 0.8
    for index, drawn in enumerate(sorted(rng.uniform(0.0, last) for _ in range(wanted))):
        # Faults that bunch at the end would outlast the job: each takes a round or two until the next one may come.
        point = max(0.0, min(drawn, last - ROUNDS_PER_FAULT * (wanted - 1 - index)))
        await run.until_committed(int(point))
        if run.ended:
            return
        yield (point % 1.0) * round_s


def _judged(outcome: Outcome, fleet: Fleet, folder: Path) -> Outcome:
    """With the verdict of the history checker, after everything has ended."""
    receipts = folder / "receipts.jsonl"
    with receipts.open("w", encoding="utf-8") as file:
        for agent in range(outcome.plan.agents):
            text = fleet.log_of(agent).read_text(encoding="utf-8", errors="replace")
            outcome.trained_again += sum(count > 1 for count in Counter(_RECEIVED.findall(text)).values())
            for task_id, status in _RECEIPT.findall(text):
                outcome.receipts += 1
                file.write(json.dumps({"task_id": task_id, "digest": "", "status": status}) + "\n")
    outcome.load = os.getloadavg()[0]
    outcome.violations = reader.examine(fleet.state_dir, receipts)
    return outcome


def _job(plan: Plan, rounds: int) -> str:
    return f"""
name = "chaos"
[method]
name = "echo"
state_mib = {plan.mib:g}
[rounds]
count = {rounds}
quorum = 1.0
[devices]
minimum = {plan.agents}
"""


def text(outcome: Outcome) -> str:
    """What came of a mode, in a few lines."""
    plan = outcome.plan
    lines = [
        f"{outcome.faults} {plan.mode}, {plan.agents} agents, {plan.rounds} rounds of {plan.mib:g} MiB, seed {plan.seed}",
        f"  job          {'completed' if outcome.completed else 'NOT COMPLETED'} in {outcome.disturbed_s:.1f} s, "
        f"undisturbed {outcome.undisturbed_s:.1f} s; final adapter {'identical' if outcome.identical else 'DIFFERS'}",
        f"  history      {len(outcome.violations)} violations, {outcome.receipts} receipts of devices looked up; "
        f"{outcome.trained_again} tasks trained again",
        f"  machine      load {outcome.load:.1f} at the end",
    ]
    if outcome.ready_s:
        lines.append(f"  ready        {_spread(outcome.ready_s)} after the restart")
    if outcome.first_accepted_s:
        lines.append(f"  first update {_spread(outcome.first_accepted_s)} after the restart")
    if outcome.stopped_s:
        lines.append(
            f"  stopped      {_spread(outcome.stopped_s)} after SIGTERM, {len(outcome.wrong_codes)} with another code than 0; "
            f"{outcome.uploads} uploads were under way"
        )
    if outcome.resent_bytes:
        mean, most = statistics.mean(outcome.resent_bytes) / MIB, max(outcome.resent_bytes) / MIB
        lines.append(f"  sent again   {mean:.2f} MiB a cut, at most {most:.2f} MiB; allowed {RESENT_MAX_BYTES / MIB:g} MiB")
    return "\n".join([*lines, *(f"  MISSED {words}" for words in outcome.missed)])


def _spread(seconds: Sequence[float]) -> str:
    return f"p50 {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s"


_COLUMNS = (
    "faults",
    "job",
    "took, undisturbed",
    "violations",
    "trained again",
    "final adapter",
    "ready again, p50 / max",
    "first accepted update, p50 / max",
    "stopped after SIGTERM, p50 / max",
    "sent again a cut, mean / max",
)


def section(outcomes: Sequence[Outcome], command: str) -> str:
    """Markdown for docs/benchmarks.md."""
    lines = [
        "## Chaos: kills and cuts in the middle of a job",
        "",
        "An `echo` job with quorum = all devices, undisturbed and then under faults at random instants spread over its rounds, with",
        "real processes. Afterwards the history checker judges the coordinator's state folder against the receipts that devices got.",
        "",
        sections.measured(command),
        f"Load of the machine at the end of each: {', '.join(f'{outcome.load:.1f}' for outcome in outcomes)}.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
    ]
    for outcome in outcomes:
        plan = outcome.plan
        resent = [size / MIB for size in outcome.resent_bytes]
        cells = (
            f"{outcome.faults} {plan.mode}",
            f"{plan.agents} agents, {plan.rounds} rounds of {plan.mib:g} MiB",
            f"{outcome.disturbed_s:.0f} s, {outcome.undisturbed_s:.0f} s",
            f"{len(outcome.violations)} ({outcome.receipts} receipts)",
            str(outcome.trained_again),
            "identical" if outcome.identical else "differs",
            _cell(outcome.ready_s, "s"),
            _cell(outcome.first_accepted_s, "s"),
            _cell(outcome.stopped_s, "s"),
            f"{statistics.mean(resent):.2f} / {max(resent):.2f} MiB" if resent else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    missed = [f"- {outcome.plan.mode}: {words}" for outcome in outcomes for words in outcome.missed]
    return "\n".join([*lines, *(["", "Missed:", "", *missed] if missed else [])])


def _cell(values: Sequence[float], unit: str) -> str:
    return f"{statistics.median(values):.2f} / {max(values):.2f} {unit}" if values else ""


def as_json(outcome: Outcome) -> dict[str, object]:
    return {**asdict(outcome), "missed": outcome.missed}


def _plans(given: argparse.Namespace) -> list[Plan]:
    one_by_one = (given.coordinator_kills, given.agent_kills, given.cuts, given.stops, given.mixed)
    wanted = (100, 100, 50, 20, 150) if given.all else one_by_one
    plans: list[Plan] = []
    for mode, faults in zip(MODES, wanted, strict=True):
        if faults:
            cutting = mode == "link cuts"
            rounds = given.rounds or (faults if cutting else max(10, 2 * faults))
            # A stop is to find uploads under way, as a cut is.
            mib = given.cut_mib if cutting or mode == "coordinator stops" else given.mib
            plans.append(Plan(mode, faults, given.agents, mib, max(rounds, faults if cutting else 1), given.seed, given.plaintext))
    return plans


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator-kills", type=int, default=0, metavar="N", help="kill -9 of the coordinator")
    parser.add_argument("--agent-kills", type=int, default=0, metavar="N", help="kill -9 of agents")
    parser.add_argument("--cuts", type=int, default=0, metavar="N", help="connections cut by a proxy, one a round")
    parser.add_argument("--stops", type=int, default=0, metavar="N", help="SIGTERM to the coordinator")
    parser.add_argument("--mixed", type=int, default=0, metavar="N", help="kill -9 of agents and half as many cuts, N in all, in one job")
    parser.add_argument("--all", action="store_true", help="100, 100, 50, 20 and 150 of them")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    parser.add_argument("--agents", type=int, default=8, help="agent processes")
    parser.add_argument("--mib", type=float, default=1.0, help="size of the state under kills in MiB")
    parser.add_argument("--cut-mib", type=float, default=20.0, help="size of the state under cuts in MiB")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of the job; if left out two a kill, one a cut")
    parser.add_argument("--seed", type=int, default=0, help="of the instants; a random one if 0")
    parser.add_argument("--plaintext", action="store_true", help="without TLS, as on one machine")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--keep", action="store_true", help="leave the files of a run in which something was missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(words)
    given.seed = given.seed or random.SystemRandom().randrange(1, 2**31)
    plans = _plans(given)
    if not plans or min(given.agents, given.mib, given.cut_mib) <= 0:
        parser.error("name --coordinator-kills, --agent-kills, --cuts, --stops or --all; sizes are above 0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"seed {given.seed}", flush=True)
    outcomes: list[Outcome] = []
    try:
        for plan in plans:
            place = Path(tempfile.mkdtemp(prefix="fleetune-chaos-", dir=given.folder))
            kept = given.keep
            try:
                outcome = asyncio.run(MODES[plan.mode](plan, place))
                kept = given.keep and bool(outcome.missed)
            finally:
                if kept:
                    print(f"files: {place}")
                else:
                    shutil.rmtree(place, ignore_errors=True)
            print(text(outcome), flush=True)
            outcomes.append(outcome)
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    if given.json is not None:
        given.json.write_text(json.dumps([as_json(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    if given.write:
        seed = [] if "--seed" in words else ["--seed", str(given.seed)]
        sections.put("chaos", section(outcomes, " ".join(["python bench/chaos.py", *words, *seed])))
    return 1 if any(outcome.missed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
