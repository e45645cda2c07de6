"""A whole testbed, each verb a process of its own: up, run with faults, status, report, down. Slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetune.coordinator.exitcodes import ExitCode
from fleetune.coordinator.testbed import crew, procs, records, statefile
from fleetune.coordinator.testbed.schedule import UNDONE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TESTBED = """
name = "trial"
[[device]]
kind = "pi5"
memory_mib = 256
disk_mib = 256
[[device]]
kind = "laptop"
"""

JOB = """
name = "trial"
[method]
name = "echo"
state_mib = 1
[rounds]
count = {rounds}
deadline_s = 30
"""


def _fault(kind: str, target: str, at_s: float) -> str:
    return f'[[fault]]\nkind = "{kind}"\ntarget = "{target}"\nat_s = {at_s}\nfor_s = 1\n'


def _may_have_namespaces() -> bool:
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in ("ip", "tc", "nsenter", "mkfs.ext4", "mount")):
        return False
    tried = subprocess.run(["ip", "netns", "add", f"ft{os.getpid()}-may"], capture_output=True, check=False)
    if tried.returncode == 0:
        subprocess.run(["ip", "netns", "del", f"ft{os.getpid()}-may"], check=True)
    return tried.returncode == 0


needs_namespaces = pytest.mark.skipif(not _may_have_namespaces(), reason="the netns backend needs root, iproute2, e2fsprogs and namespaces")


class Testbed:
    """One in a folder, spoken to by its verbs alone."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "testbed"
        self._files = folder

    def verb(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "fleetune.coordinator.cli", "testbed", *arguments, "--folder", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=self._files)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def file(self, name: str, text: str) -> str:
        (self._files / name).write_text(text, encoding="utf-8")
        return str(self._files / name)

    def members(self) -> dict[str, dict[str, Any]]:
        return {row["member"]: row for row in json.loads(self.verb("status", "--json"))["members"]}

    def processes(self, prefix: str) -> list[int]:
        names = ("coordinator", "pi5", "laptop")
        return [pid for name in names for pid in procs.marked(crew.MARK, f"{prefix}-{name}")]


@pytest.fixture
def testbed(tmp_path: Path) -> Iterator[Testbed]:
    made = Testbed(tmp_path)
    yield made
    made.verb("down", "--all")


def _up(testbed: Testbed, backend: str, code: int = 0) -> str:
    testbed.verb("up", "--backend", backend, "--file", testbed.file("testbed.toml", TESTBED), code=code)
    return "" if code else statefile.read(testbed.folder).place.prefix


def _run(testbed: Testbed, faults: str, rounds: int) -> records.Record:
    job, chaos = testbed.file("job.toml", JOB.format(rounds=rounds)), testbed.file("chaos.toml", faults)
    testbed.verb("run", "--job", job, "--chaos", chaos, "--no-report")
    return records.read(testbed.folder / "run.jsonl")


def test_plain_processes_run_a_job_through_a_kill_and_leave_nothing(testbed: Testbed) -> None:
    prefix = _up(testbed, "process")
    assert {name: row["life"] for name, row in testbed.members().items()} == dict.fromkeys(("coordinator", "pi5", "laptop"), "running")

    # Enough rounds that the run is heard of before the job is through.
    record = _run(testbed, _fault("kill", "laptop", 0.0), rounds=120)
    assert record.ended is not None
    assert record.ended.status == "completed"
    assert [(act.member, act.act) for act in record.acts] == [("laptop", "kill"), ("laptop", "restart")]
    assert record.samples[-1].members["pi5"].cpu_s is not None

    testbed.verb("report")
    assert (testbed.folder / "report.html").stat().st_size > 0
    assert "history: sound" in testbed.verb("down")
    assert testbed.processes(prefix) == []
    assert records.read(testbed.folder / "run.jsonl").checked is not None
    assert sorted(entry.name for entry in testbed.folder.iterdir()) == ["report.html", "report.json", "run.jsonl", "timeline.svg"]


@needs_namespaces
def test_namespaces_run_a_job_through_every_sort_of_fault_and_leave_nothing(testbed: Testbed) -> None:
    prefix = _up(testbed, "netns")
    faults = [
        _fault("fill_disk", "pi5", 0.0),
        _fault("cut", "laptop", 0.0),
        _fault("pause", "pi5", 1.0),
        f"{_fault('throttle', 'laptop', 1.0)}to_mbit = 2\n",
        '[[fault]]\nkind = "out_of_memory"\ntarget = "pi5"\nat_s = 2\n',
        _fault("kill", "coordinator", 3.0),
    ]
    # Enough of them that the job is not through before the last fault is over.
    record = _run(testbed, "".join(faults), rounds=60)
    assert record.ended is not None
    assert record.ended.status == "completed"
    assert {act.act for act in record.acts} >= set(UNDONE) | set(UNDONE.values()) | {"out_of_memory"}
    assert not any("could not be done" in act.text for act in record.acts)
    assert {row["life"] for row in testbed.members().values()} == {"running"}
    sample = record.samples[-1].members["pi5"]
    assert sample.sent_bytes is not None and sample.sent_bytes > 0

    # From a process that knows nothing but the folder: as after a crash.
    assert "network namespaces" in testbed.verb("down")
    assert testbed.processes(prefix) == []
    assert not list(Path("/run/netns").glob(f"{prefix}*"))
    assert "nothing to remove" in testbed.verb("down")


@needs_namespaces
def test_a_start_that_fails_half_way_is_undone(testbed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "mkfs.ext4").write_text("#!/bin/sh\necho no room >&2\nexit 1\n", encoding="utf-8")
    (tools / "mkfs.ext4").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    before = set(Path("/run/netns").glob("ft*"))
    _up(testbed, "netns", code=ExitCode.MACHINE)
    assert set(Path("/run/netns").glob("ft*")) == before
    assert not testbed.folder.exists()


@needs_namespaces
def test_what_a_killed_start_has_left_is_removed(testbed: Testbed) -> None:
    command = [sys.executable, "-m", "fleetune.coordinator.cli", "testbed", "up", "--backend", "netns", "--folder", str(testbed.folder)]
    with subprocess.Popen([*command, "--file", testbed.file("testbed.toml", TESTBED)], stderr=subprocess.PIPE, text=True) as starting:
        assert starting.stderr is not None
        assert next(line for line in starting.stderr if "making the coordinator" in line)
        starting.kill()
    prefix = statefile.read(testbed.folder).place.prefix
    assert "4 network namespaces" in testbed.verb("down")
    assert not list(Path("/run/netns").glob(f"{prefix}*"))
    assert testbed.processes(prefix) == []
    assert not testbed.folder.exists()


def test_a_folder_with_something_else_in_it_is_left_alone(testbed: Testbed) -> None:
    testbed.folder.mkdir()
    (testbed.folder / "thesis.txt").write_text("mine", encoding="utf-8")
    testbed.verb("up", "--backend", "process", code=ExitCode.USAGE)
    testbed.verb("down")
    assert (testbed.folder / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_without_a_testbed_its_verbs_say_so(testbed: Testbed) -> None:
    for verb in ("status", "run", "report"):
        testbed.verb(verb, code=ExitCode.NOT_FOUND)
