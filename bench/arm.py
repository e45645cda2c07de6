"""Real ARM binaries: the agent, installed by deploy/install.sh into an aarch64 Debian under qemu-user, works for an x86 coordinator.

    sudo .venv/bin/python bench/arm.py --folder /var/tmp/fleetune-arm      # the folder is used again the next time

It makes the userland with debootstrap (packages of the machine's own mirror), takes aarch64 wheels from pip's own index, installs, joins
with a token over TLS, and does rounds of `echo` (some over a kill -9 of the coordinator) and of `fedavg_lora` on a tiny BERT. qemu says
nothing about a board's speed. Needs root, debootstrap and qemu-user-static with binfmt; ends with 75 where one is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))

CANNOT = 75
"""EX_TEMPFAIL: this machine cannot tell."""

PYTHON = "3.11"
SUITE = "bookworm"
READY_S = 120.0
JOB_S = 900.0
ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8")
AGENT = "/opt/fleetune/current/bin/fleetune-agent"
CLASSIFY = """\
name = "arm"
seed = 3
[model]
base = "{base}"
allow_hub = false
[task]
kind = "text-classification"
labels = ["red", "green", "blue"]
[lora]
rank = 4
alpha = 8
targets = ["query", "value"]
[data]
name = "colours"
max_length = 32
[training]
steps = 8
batch_size = 8
learning_rate = 0.02
[rounds]
count = 2
[devices]
minimum = 1
"""
ECHO = '[method]\nname = "echo"\nstate_mib = {mib}\n[rounds]\ncount = {rounds}\nquorum = 1.0\n[devices]\nminimum = 1\n'


def missing() -> str:
    """Why this machine cannot do it; empty where it can."""
    if os.geteuid() != 0:
        return "only root may make a userland of another processor"
    absent = [tool for tool in ("debootstrap", "dpkg-deb", "unshare", "chroot") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not here: apt install debootstrap util-linux"
    if os.uname().machine == "aarch64":
        return ""
    handler = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
    if not handler.exists() or "enabled" not in handler.read_text():
        return "aarch64 programs do not start: apt install qemu-user-static binfmt-support; mount -t binfmt_misc binfmt_misc \
/proc/sys/fs/binfmt_misc; update-binfmts --enable qemu-aarch64"
    return ""


def mirror() -> str:
    """Where this machine's own packages come from."""
    for file in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        for line in file.read_text().splitlines() if file.exists() else []:
            words = line.split()
            if words and words[0] == "URIs:":
                return words[1]
            if words and words[0] == "deb":
                return next(word for word in words[1:] if "://" in word)
    raise SystemExit("no mirror of Debian is known here: name one with --mirror")


class Figures:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        print(f"--- {name}", flush=True)
        begun_s = time.monotonic()
        yield
        self.rows.append((name, f"{time.monotonic() - begun_s:.1f} s"))

    def told(self, name: str, words: str) -> None:
        self.rows.append((name, words))

    def table(self) -> str:
        return "\n".join(["| what | figure |", "| --- | --- |", *(f"| {name} | {words} |" for name, words in self.rows)])


class Userland:
    """An aarch64 Debian in a folder; what is mounted for a command is gone with it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, mirror_uri: str) -> None:
        """First stage only, then the packages are unpacked: their scripts would run emulated for minutes and are not needed."""
        chosen = ["--variant=minbase", "--include=python3,python3-venv,python3-pip,ca-certificates"]
        words = ["debootstrap", "--arch=arm64", "--foreign", *chosen, SUITE, str(self.root), mirror_uri]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        archives = self.root / "var/cache/apt/archives"
        for package in sorted(archives.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(self.root)], check=True)
            package.unlink()

    def command(self, *words: str) -> list[str]:
        root = self.root
        mounts = "; ".join(f"mount --rbind /{name} {root}/{name}" for name in ("proc", "sys", "dev"))
        inside = ["chroot", str(root), "/usr/bin/env", "-i", *ENVIRONMENT, *words]
        return ["unshare", "--mount", "sh", "-c", f'{mounts}; exec "$@"', "sh", *inside]

    def joined(self, line: str) -> bool:
        """One try; False where the coordinator did not answer."""
        self.run(AGENT, "join", "--name", "arm", "-", stdin=f"{line}\n", codes=(0, 3))
        return (self.root / "root/.local/state/fleetune-agent/identity/identity.json").exists()

    def run(self, *words: str, stdin: str = "", codes: Sequence[int] = (0,)) -> str:
        done = subprocess.run(self.command(*words), input=stdin, capture_output=True, text=True, check=False)
        if done.returncode not in codes:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode} on the board:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout


def tool(*words: str, **more: str) -> str:
    """A program of this machine, with this environment's Python."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env={**os.environ, **more})
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


class Coordinator:
    """`fleetune serve` on this machine, and `fleetune` as its operator."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.who = {"FLEETUNE_IDENTITY": str(folder / "operator"), "FLEETUNE_COORDINATOR": ""}
        self.log = folder / "coordinator.log"
        self.address = ""
        self._process: subprocess.Popen[bytes] | None = None

    def verb(self, *words: str) -> str:
        asked = {} if not self.address else {"FLEETUNE_COORDINATOR": self.address}
        return tool("-m", "fleetune.coordinator.cli", *words, **{**self.who, **asked})

    def start(self) -> None:
        (self.state / "address").unlink(missing_ok=True)
        words = ["serve", "--state-dir", str(self.state), "--listen", self.address or "127.0.0.1:0", "--join-listen", "127.0.0.1:0"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "fleetune.coordinator.cli", *words], stdout=log, stderr=log)
        wait_for(lambda: (self.state / "address").exists(), "the coordinator to be ready", self.log)
        self.address = (self.state / "address").read_text().strip()

    def end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def view(self, job: str) -> dict[str, object]:
        """As `fleetune jobs --json` tells it."""
        found = json.loads(self.verb("jobs", "--json"))["jobs"]
        return next(entry for entry in found if entry["job_id"] == job)

    def run_job(self, file: Path, meanwhile: Callable[[str], None] | None = None) -> dict[str, object]:
        """The job's view once it has ended, which must be well."""
        job = str(json.loads(self.verb("submit", str(file), "--json"))["job_id"])
        if meanwhile is not None:
            meanwhile(job)
        view: dict[str, object] = {}

        def ended() -> bool:
            view.update(self.view(job))
            return str(view.get("state", "")).lower() in ("completed", "failed", "cancelled")

        wait_for(ended, f"job {job} to end", self.log, JOB_S)
        if str(view["state"]).lower() != "completed":
            raise SystemExit(f"the job ended as {view['state']}: {view.get('message') or view}")
        return view


def wait_for(condition: Callable[[], bool], what: str, log: Path, within_s: float = READY_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"waited {within_s:g} s for {what}. The log ends with:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def anonymous_mib(pid: int) -> float:
    """Memory of a process and its descendants that is its own, qemu's translation included."""
    import psutil

    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes) / (1 << 20)


def rounds_on(board: Userland, folder: Path, figures: Figures) -> None:
    """The whole life of a device: join, rounds, a coordinator that is killed, the end."""
    from support import tiny_models

    base = tiny_models.tiny_classifier(folder / "base")
    rows = tiny_models.coloured_rows(48)
    (board.root / "srv").mkdir(exist_ok=True)
    tiny_models.write_jsonl(board.root / "srv/train.jsonl", rows[:36])
    tiny_models.write_jsonl(board.root / "srv/validation.jsonl", rows[36:])
    shutil.rmtree(board.root / "root/.local", ignore_errors=True)  # the device of the run before
    jobs = {"echo": ECHO.format(mib=4, rounds=3), "kill": ECHO.format(mib=4, rounds=6), "classify": CLASSIFY.format(base=base)}
    for name, text in jobs.items():
        (folder / f"{name}.toml").write_text(f'name = "{name}"\n{text}' if name != "classify" else text)

    coordinator = Coordinator(folder)
    agent: subprocess.Popen[bytes] | None = None
    agent_log = folder / "agent.log"
    try:
        coordinator.verb("init", "--state-dir", str(coordinator.state))
        coordinator.start()
        with figures.step("join by token, over TLS"):
            line = json.loads(coordinator.verb("token", "create", "--json"))["line"]
            # On a busy machine, an emulated handshake may take longer than the coordinator waits for one: as a person would, once more.
            wait_for(lambda: board.joined(line), "the device to join", coordinator.log)
        with figures.step("agent starts and is connected"), agent_log.open("wb") as log:
            words = [AGENT, "run", "--data", "colours=/srv/train.jsonl,/srv/validation.jsonl"]
            agent = subprocess.Popen(board.command(*words), stdout=log, stderr=log, start_new_session=True)
            wait_for(lambda: "connected coordinator=" in agent_log.read_text(), "the agent to connect", agent_log)
        figures.told("agent idle, own memory with qemu", f"{anonymous_mib(agent.pid):.0f} MiB")
        with figures.step("echo, 3 rounds of 4 MiB"):
            coordinator.run_job(folder / "echo.toml")

        def kill(job: str) -> None:
            wait_for(lambda: int(str(coordinator.view(job)["rounds_committed"])) >= 2, "two rounds", coordinator.log, JOB_S)
            coordinator.end(signal.SIGKILL)
            coordinator.start()

        with figures.step("echo, 6 rounds of 4 MiB, kill -9 of the coordinator between them"):
            coordinator.run_job(folder / "kill.toml", kill)
        with figures.step("fedavg_lora on a tiny BERT, 2 rounds of 8 steps"):
            coordinator.run_job(folder / "classify.toml")
        print(coordinator.verb("report", "last"))
    except BaseException:
        print(agent_log.read_text()[-3000:] if agent_log.exists() else "", coordinator.log.read_text()[-3000:], sep="\n", file=sys.stderr)
        raise
    finally:
        if agent is not None:
            os.killpg(agent.pid, signal.SIGTERM)
            try:
                agent.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
        coordinator.end(signal.SIGTERM)
    figures.told("fleetune check", tool("-m", "fleetune.coordinator.cli", "check", str(coordinator.state)).strip().splitlines()[-1])


def install(board: Userland, wheel: Path | None, figures: Figures) -> None:
    """Wheels of an aarch64 board into the userland, and what the installer makes of them there."""
    with tempfile.TemporaryDirectory() as made, figures.step("wheels"):
        wheels = board.root / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        if wheel is None:
            subprocess.run([Path(sys.executable).parent / "hatchling", "build", "-t", "wheel", "-d", made], cwd=REPO, check=True)
            wheel = next(Path(made).glob("*.whl"))
        print(tool(str(REPO / "deploy/wheels.py"), "fill", str(wheels), "--python", PYTHON, "--wheel", str(wheel)), end="")
    shutil.copy(REPO / "deploy/install.sh", board.root / "install.sh")
    with figures.step("deploy/install.sh --offline, emulated"):
        print(board.run("sh", "/install.sh", "--offline", "/wheels", "--no-systemd"), end="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="userland and wheels, kept for the next time; else a temporary one")
    parser.add_argument("--mirror", help="of Debian's packages; this machine's own if left out")
    parser.add_argument("--wheel", type=Path, help="fleetune-*.whl to install; made of this clone if left out")
    parser.add_argument("--again", action="store_true", help="with --folder: what was installed there the time before, as it is")
    chosen = parser.parse_args()
    if why := missing():
        print(f"cannot be done here: {why}", file=sys.stderr)
        return CANNOT
    figures = Figures()
    with contextlib.ExitStack() as stack:
        kept = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetune-arm-")))
        kept = kept.resolve()
        board = Userland(kept / "root")
        if not (board.root / "usr/bin/python3").exists():
            with figures.step(f"aarch64 userland, {SUITE}"):
                board.make(chosen.mirror or mirror())
        if not chosen.again:
            install(board, chosen.wheel, figures)
        used = subprocess.run(["du", "-sm", str(board.root / "opt/fleetune/versions")], capture_output=True, text=True, check=True).stdout
        figures.told("installed", f"{used.split()[0]} MB")
        print(board.run(AGENT, "version"), end="")
        rounds_on(board, Path(stack.enter_context(tempfile.TemporaryDirectory())), figures)
        with figures.step("doctor, which imports torch"):
            print(board.run(AGENT, "doctor", codes=(0, 6)), end="")
    print(f"\n{figures.table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
