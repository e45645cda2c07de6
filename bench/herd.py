"""A thousand agents that lose their coordinator together: when all of them are back, and what that takes.

The sessions are those of the agent, in a few processes and without the rest of it, each with a certificate of its own. The coordinator
is killed and started again.

    python bench/herd.py
    python bench/herd.py --plaintext
    python bench/herd.py --agents 100 --processes 2 --down-s 1 --watch-s 6
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import enrolling
import meters
import sections
from fleet import Fleet

from fleetune.agent.credentials import Credentials
from fleetune.agent.domain import Receipt, Task, Welcome
from fleetune.agent.links import Links
from fleetune.agent.session import Session
from fleetune.errors import WireError
from fleetune.v1 import fleet_pb2
from fleetune.wire import channel, identity

MIB = 1 << 20
BACK_MAX_S = 30.0
RSS_MAX_MIB = 200
RTT_MAX_S = 1.0
JOIN_S = 120.0


@dataclass
class Outcome:
    """What came of it. Seconds from the restarted coordinator's readiness on, and bytes."""

    agents: int
    plaintext: bool
    down_s: float
    """From the kill to the restart."""
    joined_s: float = 0.0
    """From the first agent's start to all of them being there the first time."""
    back_s: list[float] = field(default_factory=list[float])
    """Of each agent: negative where it was quicker than the file that tells the coordinator's address."""
    lost_again: int = 0
    """Sessions that ended after they were back."""
    online: int = 0
    """As the coordinator says at the end."""
    heartbeats: int = 0
    unanswered: int = 0
    rtt_s: list[float] = field(default_factory=list[float])
    rss_bytes: int = 0
    peak_bytes: int = 0
    cpu_share: float = 0.0
    """Of a core, the coordinator's while it only hears heartbeats."""

    @property
    def missed(self) -> list[str]:
        found: list[str] = []
        if len(self.back_s) < self.agents:
            found.append(f"only {len(self.back_s)} of {self.agents} came back")
        elif max(self.back_s) > BACK_MAX_S:
            found.append(f"the last was back after {max(self.back_s):.1f} s, {BACK_MAX_S:g} s are allowed")
        if self.lost_again or self.unanswered or self.online != self.agents:
            found.append(f"{self.lost_again} lost again, {self.unanswered} heartbeats unanswered, {self.online} online at the end")
        if self.peak_bytes > RSS_MAX_MIB * MIB:
            found.append(f"the coordinator took {self.peak_bytes / MIB:.0f} MiB, {RSS_MAX_MIB} MiB are allowed")
        if self.rtt_s and _quantile(self.rtt_s, 0.99) > RTT_MAX_S:
            found.append(f"p99 of a heartbeat's way there and back is {_quantile(self.rtt_s, 0.99):.2f} s, {RTT_MAX_S:g} s are allowed")
        return found


def member(number: int) -> str:
    return f"herd-{number:04d}"


def device(name: str) -> str:
    return f"device-{name}"


# --- one process of the crowd


class Member:
    """One agent as its session sees it; also the listener."""

    def __init__(self, address: str, name: str, device_id: str, folder: Path | None) -> None:
        """`folder`: where its identity lies; None: plaintext."""
        self.name = name
        self._device_id = device_id
        own = identity.load(folder) if folder is not None else None
        self.links = Links(lambda: channel.open_channel(address, own))
        self.session = _Timed(self.links, Credentials(folder or Path(), own, address), self, self._hello, self._heartbeat)
        self.connects_s: list[float] = []
        self.losses_s: list[float] = []
        self.asked_s: dict[int, float] = {}
        self.rtts: list[tuple[float, float]] = []
        """(when it was answered, seconds it took)."""
        self._instance_id = uuid.uuid4().hex

    def connected(self, welcome: Welcome) -> None:
        self.connects_s.append(time.monotonic())
        self.asked_s.clear()

    def disconnected(self) -> None:
        self.losses_s.append(time.monotonic())

    def task(self, task: Task) -> None: ...
    def unusable_task(self, task_id: str, lease: int, error: WireError) -> None: ...
    def cancel(self, task_id: str, reason: str) -> None: ...
    def receipt(self, receipt: Receipt) -> None: ...
    def renew(self) -> None: ...
    def set_uplink(self, task_id: str, bits_per_s: float) -> None: ...
    def answered(self, seconds: float) -> None: ...

    def replied(self, sequence: int) -> None:
        now_s = time.monotonic()
        if (asked_s := self.asked_s.pop(sequence, None)) is not None:
            self.rtts.append((now_s, now_s - asked_s))

    async def _hello(self) -> fleet_pb2.Hello:
        return fleet_pb2.Hello(
            protocol_major=channel.PROTOCOL_MAJOR,
            protocol_minor=channel.PROTOCOL_MINOR,
            agent_version="herd",
            device_id=self._device_id,
            device_name=self.name,
            instance_id=self._instance_id,
            methods=["echo"],
            availability=fleet_pb2.Availability(accepts_tasks=True),
        )

    async def _heartbeat(self, sequence: int) -> fleet_pb2.Heartbeat:
        self.asked_s[sequence] = time.monotonic()
        return fleet_pb2.Heartbeat(sequence=sequence)


class _Timed(Session):
    """The agent's session; of the coordinator's answers to heartbeats it is noted which are missing, too."""

    _listener: Member

    def _hear(self, response: fleet_pb2.SessionResponse, welcome: Welcome) -> None:
        if response.HasField("heartbeat_reply"):
            self._listener.replied(response.heartbeat_reply.sequence)
        super()._hear(response, welcome)


async def crowd(address: str, first: int, count: int, identities: Path | None) -> None:
    """Keep sessions open until standard input ends; each line on it is a time, answered by what has happened since."""
    names = [member(number) for number in range(first, first + count)]
    members = [Member(address, name, device(name), identities / name if identities is not None else None) for name in names]
    running = [asyncio.create_task(member.session.run()) for member in members]
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        since_s, now_s = float(line), time.monotonic()
        answer = {
            "connected": sum(member.session.connected for member in members),
            "connects_s": [[at_s for at_s in member.connects_s if at_s >= since_s] for member in members],
            "losses": sum(at_s >= since_s for member in members for at_s in member.losses_s),
            "rtt_s": [took_s for member in members for at_s, took_s in member.rtts if at_s >= since_s],
            "unanswered": sum(now_s - at_s > RTT_MAX_S for member in members for at_s in member.asked_s.values()),
        }
        print(json.dumps(answer), flush=True)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.gather(*(member.links.close() for member in members))


# --- the bench


class Crowds:
    """The processes. Used with `async with`."""

    def __init__(self, address: str, agents: int, processes: int, log: Path, identities: Path | None) -> None:
        self._address = address
        self._identities = identities
        self._shares = [range(agents)[part::processes] for part in range(processes)]
        self._log = log
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Crowds:
        first = 0
        with self._log.open("ab") as log:
            for share in self._shares:
                command = [sys.executable, __file__, "--crowd", self._address, str(first), str(len(share))]
                command += [str(self._identities)] if self._identities is not None else []
                self._processes.append(
                    await asyncio.create_subprocess_exec(
                        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, limit=64 * MIB
                    )
                )
                first += len(share)
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), 30)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()

    async def ask(self, since_s: float) -> list[dict[str, object]]:
        """Of each process, what has happened since a time by the monotonic clock, which all processes share."""
        answers: list[dict[str, object]] = []
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{since_s}\n".encode())
        for process in self._processes:
            assert process.stdout is not None
            line = await process.stdout.readline()
            if not line:
                raise RuntimeError(f"a process of the crowd has ended; see {self._log}")
            answers.append(json.loads(line))
        return answers

    async def all_connected(self, agents: int, since_s: float, within_s: float) -> bool:
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s:
            answers = await self.ask(since_s)
            # Not by who counts as connected alone: a process that was held up may not have heard yet that it is not any more.
            since = [connects for answer in answers for connects in _lists(answer["connects_s"])]
            if sum(_number(answer["connected"]) for answer in answers) == agents and all(since):
                return True
            await asyncio.sleep(0.2)
        return False


async def herd(agents: int, processes: int, down_s: float, watch_s: float, folder: Path, *, plaintext: bool) -> Outcome:
    """All join, all lose the coordinator, all come back, and then nothing happens for a while."""
    outcome = Outcome(agents, plaintext, down_s)
    fleet = Fleet(folder, 0, plaintext=plaintext)
    identities: Path | None = None
    if not plaintext:
        identities = folder / "identities"
        await asyncio.to_thread(enrolling.initialised, fleet.state_dir, folder / "operator")
        names = [member(number) for number in range(agents)]
        await enrolling.registered(fleet.state_dir, [(name, device(name), identities / name) for name in names])
    async with fleet:
        started_s = time.monotonic()
        async with Crowds(fleet.address, agents, processes, folder / "crowd.log", identities) as crowds:
            if not await crowds.all_connected(agents, 0.0, JOIN_S):
                raise RuntimeError(f"not all of {agents} agents joined within {JOIN_S:g} s")
            outcome.joined_s = time.monotonic() - started_s
            killed_s = time.monotonic()
            fleet.kill_coordinator()
            await asyncio.sleep(down_s)
            await fleet.start_coordinator()
            ready_s = time.monotonic()
            await crowds.all_connected(agents, killed_s, 2 * BACK_MAX_S)
            for answer in await crowds.ask(killed_s):
                for connects in _lists(answer["connects_s"]):
                    outcome.back_s += [at_s - ready_s for at_s in connects[:1]]
            back_s, busy_s = time.monotonic(), meters.cpu_s(fleet.coordinator)
            await asyncio.sleep(watch_s)
            outcome.cpu_share = (meters.cpu_s(fleet.coordinator) - busy_s) / (time.monotonic() - back_s)
            for answer in await crowds.ask(back_s):
                outcome.lost_again += _number(answer["losses"])
                outcome.unanswered += _number(answer["unanswered"])
                outcome.rtt_s += _figures(answer["rtt_s"])
            outcome.heartbeats = len(outcome.rtt_s)
            if (memory := meters.memory(fleet.coordinator)) is not None:
                outcome.rss_bytes, outcome.peak_bytes = memory.resident, memory.peak
            async with fleet.client() as client:
                outcome.online = (await client.server_info()).devices_online
    return outcome


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def _figures(value: object) -> list[float]:
    assert isinstance(value, list)
    return [float(item) for item in value]


def _lists(value: object) -> list[list[float]]:
    assert isinstance(value, list)
    return [_figures(item) for item in value]


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def text(outcome: Outcome) -> str:
    """What came of it, in a few lines."""
    back = outcome.back_s or [float("nan")]
    rtt = outcome.rtt_s or [float("nan")]
    lines = [
        f"{outcome.agents} agents lose their coordinator together, for {outcome.down_s:g} s; "
        f"{'plaintext' if outcome.plaintext else 'mutual TLS, each with a certificate of its own'}",
        f"  joined     all within {outcome.joined_s:.1f} s of their start",
        f"  back       {len(outcome.back_s)}: half after {statistics.median(back):.1f} s, the last after {max(back):.1f} s",
        f"  then       {outcome.lost_again} lost again, {outcome.heartbeats} heartbeats, {outcome.unanswered} unanswered, "
        f"{outcome.online} online; there and back p50 {1e3 * statistics.median(rtt):.1f} ms, p99 {1e3 * _quantile(rtt, 0.99):.1f} ms",
        f"  coordinator  RSS {outcome.rss_bytes / MIB:.0f} MiB, peak {outcome.peak_bytes / MIB:.0f} MiB; "
        f"{100 * outcome.cpu_share:.0f} % of a core for the heartbeats",
    ]
    return "\n".join([*lines, *(f"  MISSED {words}" for words in outcome.missed)])


def section(outcome: Outcome, command: str) -> str:
    """Markdown for docs/benchmarks.md."""
    own = "a connection" if outcome.plaintext else "a connection and a certificate"
    lines = [
        "## Herd: all agents lose their coordinator at once",
        "",
        f"{outcome.agents} sessions of the agent, each with {own} of its own; the coordinator is killed",
        f"and started again {outcome.down_s:g} s later.",
        "",
        sections.measured(command),
        "",
        "```",
        text(outcome),
        "```",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every promise was kept."""
    given_words = list(sys.argv[1:] if arguments is None else arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if given_words[:1] == ["--crowd"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
        asyncio.run(crowd(given_words[1], int(given_words[2]), int(given_words[3]), Path(given_words[4]) if given_words[4:] else None))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=1000, help="sessions")
    parser.add_argument("--processes", type=int, default=4, help="that hold them")
    parser.add_argument("--down-s", type=float, default=10.0, help="from the kill to the restart")
    parser.add_argument("--watch-s", type=float, default=30.0, help="how long they are watched after they are back")
    parser.add_argument("--plaintext", action="store_true", help="without TLS")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    given = parser.parse_args(given_words)
    if hard != resource.RLIM_INFINITY and hard < 4 * given.agents:
        parser.error(f"the hard limit of open files is {hard}; {4 * given.agents} are needed (soft was {soft})")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = Path(tempfile.mkdtemp(prefix="fleetune-herd-", dir=given.folder))
    try:
        outcome = asyncio.run(herd(given.agents, given.processes, given.down_s, given.watch_s, place, plaintext=given.plaintext))
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(text(outcome))
    if given.json is not None:
        with contextlib.suppress(FileNotFoundError):
            given.json.unlink()
        given.json.write_text(json.dumps({**asdict(outcome), "missed": outcome.missed}, indent=2) + "\n", encoding="utf-8")
    if given.write:
        sections.put("herd", section(outcome, " ".join(["python bench/herd.py", *given_words])))
    return 1 if outcome.missed else 0


if __name__ == "__main__":
    sys.exit(main())
