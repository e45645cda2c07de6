"""Links as they are out there: packets that are lost, late and doubled; an uplink that an update fills; a coordinator out of reach.

Real processes, each in a network namespace with a shaped link. Root and Linux only.

    sudo .venv/bin/python bench/wan.py --lossy                # 20 Mbit/s, 40 ms there and back, 5 ms jitter, 1 % loss, 0.5 % doubled
    sudo .venv/bin/python bench/wan.py --saturated 120        # seconds during which updates fill an uplink of 10 Mbit/s
    sudo .venv/bin/python bench/wan.py --away 600             # seconds without a coordinator
    sudo .venv/bin/python bench/wan.py --all --write
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import herd
import meters
import sections
import testbed_links
from netfleet import COORDINATOR, Board, NetFleet

from fleetune.agent import identity as devices
from fleetune.agent.domain import Welcome
from fleetune.coordinator.faults import MachineError
from fleetune.v1 import fleet_pb2

MIB = 1 << 20
MBIT = 1e6
CABLE = Path(__file__).with_name("cable.py")
OPTIONS = ("--keep-rounds", "1")
STUCK_S = 600.0
LOOK_S = 0.5

LOSSY_MBIT = 20.0
LATENCY_MS = 20.0
JITTER_S, LOSS, DOUBLED = 0.005, 0.01, 0.005
LOSSY_ROUNDS = 5
LOSSY_SHARE_MIN = 0.85
"""Of the cap, payload alone."""

FULL_MBIT = 10.0
FULL_SHARE_MIN = 0.8
HEARTBEAT_S = 1.0
RTT_MAX_S = 1.0

UPDATE_MIB = 20.0
WAITING_CPU_MAX = 0.01
BACK_MAX_S = 30.0


@dataclass
class Outcome:
    """What came of one of them."""

    mode: str
    lines: list[str] = field(default_factory=list[str])
    missed: list[str] = field(default_factory=list[str])
    load: float = 0.0

    def say(self, text: str, *, missed: bool = False) -> None:
        self.lines.append(text)
        if missed:
            self.missed.append(text)


@contextlib.contextmanager
def fleet_of(boards: Sequence[Board], folder: Path, *, serve: Sequence[str] = (), cable: Path | None = None) -> Generator[NetFleet]:
    place = Path(tempfile.mkdtemp(prefix="fleetune-wan-", dir=folder))
    try:
        with NetFleet(place, boards, serve=(*OPTIONS, *serve), cable=cable) as fleet:
            yield fleet
    finally:
        shutil.rmtree(place, ignore_errors=True)


def lossy(folder: Path) -> Outcome:
    """How much of a bad link's rate an update gets."""
    outcome = Outcome("lossy link")
    os.environ["CABLE"] = f"{JITTER_S} {LOSS} {DOUBLED}"
    rate = LOSSY_MBIT * MBIT
    try:
        with fleet_of([Board("far", 1.0, rate, rate, latency_ms=LATENCY_MS)], folder, cable=CABLE) as fleet:
            raw = testbed_links.goodput(fleet.hosts, "far", COORDINATOR, UPDATE_MIB * MIB)
            job = _submit(fleet, LOSSY_ROUNDS)
            _until_ended(fleet, job)
            rates = [8 * size / took_s for size, took_s in _uploads(fleet, job) if took_s > 0]
            status = _status(fleet, job)
    finally:
        del os.environ["CABLE"]
    outcome.say(
        f"{LOSSY_MBIT:g} Mbit/s, {2 * LATENCY_MS:g} ms there and back, {1e3 * JITTER_S:g} ms jitter, {LOSS:.0%} of the frames lost, "
        f"{DOUBLED:.1%} doubled; {LOSSY_ROUNDS} rounds of {UPDATE_MIB:g} MiB"
    )
    outcome.say(f"  job          {status}", missed=status != "completed")
    share = statistics.median(rates) / rate
    outcome.say(
        f"  uploads      {min(rates) / MBIT:.1f} to {max(rates) / MBIT:.1f} Mbit/s, median {statistics.median(rates) / MBIT:.1f}: "
        f"{share:.0%} of the cap ({LOSSY_SHARE_MIN:.0%} wanted); plain TCP on the same link {raw / MBIT:.1f}",
        missed=share < LOSSY_SHARE_MIN,
    )
    return outcome


def saturated(folder: Path, seconds: float) -> Outcome:
    """Heartbeats of a second session on the same uplink, while updates fill it."""
    outcome = Outcome("full uplink")
    board = Board("narrow", 1.0, FULL_MBIT * MBIT, 100 * MBIT)
    heart = Board("heart", 1.0, 100 * MBIT, 100 * MBIT)
    with fleet_of([board, heart], folder, serve=("--heartbeat-s", f"{HEARTBEAT_S:g}")) as fleet:
        # Its identity goes to a session of its own, which shares the other board's uplink.
        fleet.kill_agent(heart.name)
        job = _submit(fleet, 100_000)
        _until(fleet, lambda: _committed(fleet, job) >= 1, "the first round")
        command = [sys.executable, __file__, "--heart", fleet.address, str(fleet.state_of(heart.name)), heart.name]
        with subprocess.Popen(
            fleet.hosts.entering(board.name, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as beating:
            assert beating.stdin is not None and beating.stdout is not None
            assert beating.stdout.readline() == "connected\n"
            begun_s, sent = time.monotonic(), fleet.hosts.traffic()[board.name][0]
            while time.monotonic() - begun_s < seconds:
                time.sleep(LOOK_S)
                fleet.check()
            share = 8 * (fleet.hosts.traffic()[board.name][0] - sent) / (time.monotonic() - begun_s) / (FULL_MBIT * MBIT)
            beating.stdin.close()
            told = json.loads(beating.stdout.readline())
        lost = len(re.findall(rf"device={board.name}\b.* (?:lost|gone|silent|disconnected)", fleet.log_of(COORDINATOR)))
        connected = fleet.log_of(board.name).count("connected to the coordinator")
        rounds = _committed(fleet, job)
        fleet.verb("cancel", job)
    rtts = sorted(map(float, told["rtt_s"]))
    p50, p99 = statistics.median(rtts), rtts[min(len(rtts) - 1, int(0.99 * len(rtts)))]
    outcome.say(
        f"an uplink of {FULL_MBIT:g} Mbit/s, filled to {share:.0%} for {seconds:.0f} s by updates of {UPDATE_MIB:g} MiB, {rounds} rounds",
        missed=share < FULL_SHARE_MIN,
    )
    outcome.say(
        f"  heartbeats   {len(rtts)} of a second session on it, there and back p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms, "
        f"max {1e3 * rtts[-1]:.0f} ms; {told['unanswered']} unanswered",
        missed=p99 > RTT_MAX_S or bool(told["unanswered"]),
    )
    outcome.say(
        f"  sessions     {told['losses']} and {lost} lost, the busy device connected {max(1, connected)} time(s)",
        missed=bool(told["losses"] or lost) or connected > 1,
    )
    return outcome


def away(folder: Path, seconds: float) -> Outcome:
    """Two agents without their coordinator: one behind a cable that is pulled, one whose coordinator is dead."""
    outcome = Outcome("coordinator away")
    boards = [Board(name, 1.0, 100 * MBIT, 100 * MBIT) for name in ("unplugged", "refused")]
    with fleet_of(boards, folder) as fleet:
        pids = {board.name: fleet.pid(board.name) for board in boards}
        fleet.hosts.cut("unplugged")
        fleet.stop_coordinator()
        # What losing it takes is another figure than what waiting takes.
        time.sleep(min(30.0, seconds / 10))
        before = {name: meters.cpu_s(pid) for name, pid in pids.items()}
        begun_s = time.monotonic()
        time.sleep(seconds)
        waited_s = time.monotonic() - begun_s
        shares = {name: (meters.cpu_s(pid) - before[name]) / waited_s for name, pid in pids.items()}
        fleet.hosts.mend("unplugged")
        fleet.start_coordinator()
        ready_s = time.monotonic()
        _until(fleet, lambda: fleet.online() == len(boards), "both to be back")
        back_s = time.monotonic() - ready_s
        said = {name: len(fleet.log_of(name).splitlines()) for name in pids}
    outcome.say(f"no coordinator for {seconds:.0f} s; one agent's cable is pulled, the other's dials are refused")
    for name, share in shares.items():
        outcome.say(f"  {name:<12} {share:.2%} of a core, {said[name]} lines of log in all", missed=share > WAITING_CPU_MAX)
    outcome.say(f"  back         both within {back_s:.1f} s of the coordinator's readiness", missed=back_s > BACK_MAX_S)
    return outcome


# --- a fleet's jobs


def _submit(fleet: NetFleet, rounds: int) -> str:
    file = fleet.state_of("job.toml")
    file.write_text(
        f'name = "wan"\n[method]\nname = "echo"\nstate_mib = {UPDATE_MIB:g}\n[rounds]\ncount = {rounds}\n[devices]\nminimum = 1\n',
        encoding="utf-8",
    )
    return str(json.loads(fleet.verb("submit", str(file), "--json"))["job_id"])


def _ask(fleet: NetFleet, question: str, *values: str) -> list[tuple[object, ...]]:
    place = (fleet.state_of(COORDINATOR) / "coordinator.sqlite").resolve().as_uri() + "?mode=ro"
    with closing(sqlite3.connect(place, uri=True, timeout=5)) as connection:
        return connection.execute(question, values).fetchall()


def _status(fleet: NetFleet, job: str) -> str:
    return str(_ask(fleet, "SELECT status FROM jobs WHERE job_id = ?", job)[0][0])


def _committed(fleet: NetFleet, job: str) -> int:
    found = _ask(fleet, "SELECT MAX(round) FROM rounds WHERE job_id = ?", job)[0][0]
    return found if isinstance(found, int) else 0


def _uploads(fleet: NetFleet, job: str) -> list[tuple[int, float]]:
    """(bytes, seconds from the first to the last) of each update, as the coordinator took them."""
    found: list[tuple[int, float]] = []
    for (entry,) in _ask(fleet, "SELECT entry FROM rounds WHERE job_id = ? ORDER BY round", job):
        for task in json.loads(str(entry))["tasks"].values():
            if task["update"] is not None:
                found.append((int(task["update"]["blob"]["size_bytes"]), float(task["update"]["sent_s"])))
    return found


def _until_ended(fleet: NetFleet, job: str) -> None:
    _until(fleet, lambda: _status(fleet, job) in ("completed", "failed", "cancelled"), "the job's end")


def _until(fleet: NetFleet, reached: object, what: str) -> None:
    assert callable(reached)
    deadline_s = time.monotonic() + STUCK_S
    while not reached():
        fleet.check()
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not within {STUCK_S:g} s: {what}")
        time.sleep(LOOK_S)


# --- the second session


class _Heart(herd.Member):
    """Tells when it is there."""

    def __init__(self, address: str, name: str, device_id: str, folder: Path) -> None:
        super().__init__(address, name, device_id, folder)
        self.there = asyncio.Event()

    def connected(self, welcome: Welcome) -> None:
        super().connected(welcome)
        self.there.set()

    async def _hello(self) -> fleet_pb2.Hello:
        hello = await super()._hello()
        hello.availability.CopyFrom(fleet_pb2.Availability(accepts_tasks=False, reason="it only beats"))
        return hello


async def heart(address: str, state_dir: Path, name: str) -> None:
    """A session that only beats, until standard input ends; then one line with what became of its heartbeats."""
    member = _Heart(address, name, devices.device_id(state_dir), state_dir / "identity")
    running = asyncio.create_task(member.session.run())
    await member.there.wait()
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    now_s = time.monotonic()
    unanswered = sum(now_s - asked_s > RTT_MAX_S for asked_s in member.asked_s.values())
    told = {"rtt_s": [took_s for _, took_s in member.rtts], "losses": len(member.losses_s), "unanswered": unanswered}
    print(json.dumps(told), flush=True)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await member.links.close()


# --- what is said


def text(outcome: Outcome) -> str:
    lines = [f"{line}  MISSED" if line in outcome.missed else line for line in outcome.lines]
    return "\n".join([*lines, f"  machine      load {outcome.load:.1f} at the end"])


def section(outcomes: Sequence[Outcome], command: str) -> str:
    """Markdown for docs/benchmarks.md."""
    lines = [
        "## Bad links",
        "",
        "Real coordinator and agents in network namespaces. Rates are the kernel's token buckets; loss, jitter and doubled frames are",
        "made by bench/cable.py, in Python, between two TAP devices. The heartbeats are those of a second session of the agent's own code",
        "on the same uplink, which shares nothing else with the busy agent.",
        "",
        sections.measured(command),
        "",
        "```",
        *map(text, outcomes),
        "```",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every promise was kept."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--heart"]:
        asyncio.run(heart(words[1], Path(words[2]), words[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lossy", action="store_true", help="a link that loses, delays and doubles")
    parser.add_argument("--saturated", type=float, default=0.0, metavar="SECONDS", help="an uplink that updates fill")
    parser.add_argument("--away", type=float, default=0.0, metavar="SECONDS", help="no coordinator")
    parser.add_argument("--all", action="store_true", help="all of them, ten minutes for each of the last two")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    given = parser.parse_args(words)
    if given.all:
        given.lossy, given.saturated, given.away = True, 600.0, 600.0
    if not (given.lossy or given.saturated > 0 or given.away > 0):
        parser.error("name --lossy, --saturated, --away or --all")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes: list[Outcome] = []
    try:
        measures: list[tuple[float, Callable[[], Outcome]]] = [
            (given.lossy, lambda: lossy(given.folder)),
            (given.saturated, lambda: saturated(given.folder, given.saturated)),
            (given.away, lambda: away(given.folder, given.away)),
        ]
        for wanted, measure in measures:
            if wanted:
                outcomes.append(measure())
                outcomes[-1].load = os.getloadavg()[0]
                print(text(outcomes[-1]), flush=True)
    except MachineError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    if given.write:
        sections.put("wan", section(outcomes, " ".join(["python bench/wan.py", *words])))
    return 1 if any(outcome.missed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
