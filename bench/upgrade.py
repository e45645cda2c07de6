"""A fleet of an earlier version is upgraded within a job: the coordinator first, then one agent after another.

The earlier version is taken from this repository's history and run beside the present one, with the same libraries.

    python bench/upgrade.py
    python bench/upgrade.py --revision c5cf1d2 --agents 3
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chaos import LOOK_S, STUCK_S, Ledger

from fleetune.coordinator.history import reader
from fleetune.wire import digests

REPO = Path(__file__).resolve().parents[1]
REVISION = "c5cf1d2"
"""The last one before agents proved who they are."""

ROOTS = ("coordinator", "agent", "proto")
ROUNDS_BETWEEN = 5
READY_S = 60.0
STOP_S = 20.0


@dataclass
class Outcome:
    """What came of it."""

    revision: str
    agents: int
    rounds: int = 0
    steps: list[str] = field(default_factory=list[str])
    """What was replaced, with the round in which it was."""
    identical: bool = False
    violations: list[str] = field(default_factory=list[str])
    missed: list[str] = field(default_factory=list[str])


class Fleet:
    """Processes of both versions on one folder. Used with `with`."""

    def __init__(self, folder: Path, old: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "coordinator"
        self.address = ""
        self._old = os.pathsep.join(str(old / root) for root in ROOTS)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        # Loopback without certificates is what both versions can.
        self._plain = {"serve": self._knows("fleetune.coordinator.cli", "serve"), "run": self._knows("fleetune.agent.cli", "run")}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*(name for name in self._running if name != "coordinator"), "coordinator"]:
            self.stop(name)

    def _knows(self, module: str, verb: str) -> tuple[str, ...]:
        ended = subprocess.run([sys.executable, "-m", module, verb, "--help"], capture_output=True, text=True, check=False)
        return ("--plaintext",) if "--plaintext" in ended.stdout else ()

    async def coordinator(self, *, old: bool) -> None:
        self.stop("coordinator")
        address = self.state_dir / "address"
        address.unlink(missing_ok=True)
        serve = ["fleetune.coordinator.cli", "serve", "--listen", self.address or "127.0.0.1:0", "--state-dir", str(self.state_dir)]
        self._start("coordinator", [*serve, "--lease-s", "60", *(() if old else self._plain["serve"])], old=old)
        await self._until(address.exists, "the coordinator to be ready")
        self.address = address.read_text(encoding="ascii").strip()

    def agent(self, name: str, *, old: bool) -> None:
        self.stop(name)
        run = ["fleetune.agent.cli", "run", "--coordinator", self.address, "--name", name, "--state-dir", str(self.folder / name)]
        self._start(name, [*run, *(() if old else self._plain["run"])], old=old)

    def stop(self, name: str) -> None:
        """In order, by SIGTERM."""
        if (process := self._running.pop(name, None)) is not None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def submit(self, rounds: int, agents: int) -> str:
        """With the operator's tool of the earlier version, which talks to either."""
        job = f'name = "upgrade"\n[method]\nname = "echo"\nstate_mib = 0.1\n[rounds]\ncount = {rounds}\nquorum = 1.0\n'
        ended = subprocess.run(
            [sys.executable, "-m", "fleetune.coordinator.cli", "--coordinator", self.address, "submit", "-"],
            input=f"{job}[devices]\nminimum = {agents}\n",
            capture_output=True,
            text=True,
            timeout=READY_S,
            env=self._environment(old=True),
            check=False,
        )
        if ended.returncode:
            raise RuntimeError(f"the job was not taken: {ended.stdout}{ended.stderr}")
        return str(Ledger(self.state_dir).ask("SELECT job_id FROM jobs ORDER BY submitted_unix_s DESC"))

    async def committed(self, job_id: str, rounds: int) -> None:
        ledger = Ledger(self.state_dir)
        await self._until(lambda: ledger.committed(job_id) >= rounds, f"round {rounds} (job {job_id})")

    async def final(self, job_id: str) -> str:
        """Digest of the job's final adapter."""
        file = self.state_dir / "jobs" / job_id / "final" / "adapter_model.safetensors"
        ledger = Ledger(self.state_dir)
        await self._until(lambda: ledger.status(job_id) == "completed" and file.is_file(), f"the end of job {job_id}")
        return digests.of_file(file)

    async def _until(self, reached: object, what: str) -> None:
        assert callable(reached)
        deadline_s = time.monotonic() + STUCK_S
        while not reached():
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with code {process.returncode}:\n{self.log_of(name)[-2000:]}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"waited for {what}:\n{self.log_of('coordinator')[-2000:]}")
            await asyncio.sleep(LOOK_S)

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _start(self, name: str, arguments: Sequence[str], *, old: bool) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=log, stderr=log, env=self._environment(old=old), start_new_session=True
            )

    def _environment(self, *, old: bool) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
        # A folder on PYTHONPATH goes before what is installed: every package below `fleetune` is the earlier one then.
        return {**kept, "PYTHONPATH": self._old} if old else kept


async def upgraded(fleet: Fleet, outcome: Outcome) -> None:
    """One job undisturbed by the earlier version alone, the same again while everything is replaced."""
    names = [f"upgrade-{number}" for number in range(outcome.agents)]
    # Many more than there are steps: the job is not to be over where this process is held up for some seconds.
    outcome.rounds = ROUNDS_BETWEEN * (outcome.agents + 2) * 10
    await fleet.coordinator(old=True)
    for name in names:
        fleet.agent(name, old=True)
    expected = await fleet.final(fleet.submit(outcome.rounds, outcome.agents))
    job_id = fleet.submit(outcome.rounds, outcome.agents)
    ledger = Ledger(fleet.state_dir)
    await fleet.committed(job_id, ROUNDS_BETWEEN)
    await fleet.coordinator(old=False)
    outcome.steps.append(f"the coordinator after round {ledger.committed(job_id)}")
    for name in names:
        await fleet.committed(job_id, ledger.committed(job_id) + ROUNDS_BETWEEN)
        fleet.agent(name, old=False)
        outcome.steps.append(f"{name} after round {ledger.committed(job_id)}")
    outcome.identical = await fleet.final(job_id) == expected
    if not outcome.identical:
        outcome.missed.append("the final adapter differs from that of the earlier version alone")
    last = outcome.steps[-1].rpartition(" ")[2]
    if int(last) >= outcome.rounds:
        outcome.missed.append("the job ended before everything was replaced")
    for name in ("coordinator", *names):
        fleet.stop(name)
        if "Traceback" in fleet.log_of(name):
            outcome.missed.append(f"{name} logged a trace:\n{fleet.log_of(name)[-2000:]}")
    outcome.violations = [str(violation) for violation in reader.examine(fleet.state_dir)]
    outcome.missed += outcome.violations


@contextlib.contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """The sources of a revision. RuntimeError where git or the revision is not there."""
    place = folder / "earlier"
    place.mkdir()
    if shutil.which("git") is None:
        raise RuntimeError("git is not installed")
    archive = subprocess.run(["git", "-C", str(REPO), "archive", revision, *ROOTS], capture_output=True, check=False)
    if archive.returncode:
        raise RuntimeError(f"this repository has no revision {revision}: {archive.stderr.decode(errors='replace').strip()}")
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    yield place


def text(outcome: Outcome) -> str:
    """What came of it, in a few lines."""
    lines = [
        f"{outcome.agents} agents and a coordinator of {outcome.revision}, upgraded within a job of {outcome.rounds} rounds",
        *(f"  replaced {step}" for step in outcome.steps),
        f"  final adapter {'identical' if outcome.identical else 'DIFFERS'}, {len(outcome.violations)} violations",
    ]
    return "\n".join([*lines, *(f"  MISSED {words}" for words in outcome.missed)])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every promise was kept, 2 where it cannot be tried here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default=REVISION, help="the earlier version")
    parser.add_argument("--agents", type=int, default=2, help="agents")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files lie")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = Path(tempfile.mkdtemp(prefix="fleetune-upgrade-", dir=given.folder))
    outcome = Outcome(given.revision, given.agents)
    try:
        try:
            with checked_out(given.revision, place) as old, Fleet(place, old) as fleet:
                asyncio.run(upgraded(fleet, outcome))
        except RuntimeError as error:
            if "revision" in str(error) or "git is not" in str(error):
                parser.error(str(error))
            raise
    except KeyboardInterrupt:
        print("interrupted; all processes have ended", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(text(outcome))
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
    return 1 if outcome.missed else 0


if __name__ == "__main__":
    sys.exit(main())
