"""The demo with real processes on a tiny model: it ends well, and it ends whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from support.tiny_models import tiny_classifier

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

WAIT_S = 300.0
"""Only a hang takes longer, also on a loaded machine."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("models") / "tiny")


def command(base: Path, folder: Path, *words: str) -> list[str]:
    demo = [sys.executable, "-m", "fleetune.coordinator.cli", "demo", "--base", str(base), "--keep", str(folder), "--steps", "2"]
    return [*demo, "--plain", *words]


def relatives(folder: Path) -> list[psutil.Process]:
    """Every process that was started for the demo in `folder`, and what those started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                for relative in (process, *process.children(recursive=True)):
                    found[relative.pid] = relative
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, WAIT_S)
    return not alive


@contextmanager
def running(base: Path, folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process; whatever is left of it at the end is killed."""
    output = folder.with_suffix(".out")
    with output.open("w") as file:
        process = subprocess.Popen(command(base, folder, *words), stdout=file, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            for left in relatives(folder):
                with suppress(psutil.NoSuchProcess):  # about to end by itself
                    left.kill()
            process.wait()


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> str:
    """The demo's output as soon as it holds `pattern`."""
    deadline = time.monotonic() + WAIT_S
    text = ""
    while time.monotonic() < deadline:
        text = folder.with_suffix(".out").read_text()
        if re.search(pattern, text):
            return text
        assert process.poll() is None, text
        time.sleep(0.05)
    raise AssertionError(f"no {pattern!r} within {WAIT_S} s:\n{text}")


def test_a_short_demo_ends_with_an_adapter_that_its_own_three_lines_load(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    done = subprocess.run(command(base, folder, "--rounds", "2", "--agents", "2", "--json"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["state"] == "completed"
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert [item["updates_folded"] for item in summary["job"]["history"]] == [2, 2]
    assert relatives(folder) == []
    assert len(summary["load"]) == 3
    script = "\n".join([*summary["load"], "print(sum('lora' in name for name, _ in model.named_parameters()) > 0)"])
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "True"


@pytest.mark.parametrize("method", ["fedspine", "fedara"])
def test_a_short_demo_of_what_makes_models_smaller_ends_with_less(base: Path, tmp_path: Path, method: str) -> None:
    words = ("--rounds", "4", "--agents", "2", "--steps", "5", "--method", method, "--json")
    done = subprocess.run(command(base, tmp_path / "work", *words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["state"] == "completed"
    history = summary["job"]["history"]
    assert [item["updates_folded"] for item in history] == [2] * 4
    if method == "fedspine":
        trained = [task for task in history[-1]["tasks"] if task.get("pruning")]
        assert [task["pruning"]["sparsity_after"] for task in trained] == [0.5, 0.5]
    assert history[-1]["upload_bytes"] < history[0]["upload_bytes"]
    assert relatives(tmp_path / "work") == []


@pytest.mark.parametrize("moment", [r"one coordinator", r"round 1/\d+ started"])
def test_ctrl_c_ends_every_process_in_order_and_without_a_trace(base: Path, tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "work"
    with running(base, folder, "--rounds", "500", "--agents", "2") as process:
        wait_for(folder, moment, process)
        family = relatives(folder)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert all_gone(family)
        assert relatives(folder) == []
    text = folder.with_suffix(".out").read_text()
    assert "stopping" in text
    assert "Traceback" not in text
    for log in (folder / "logs").iterdir():
        assert "Traceback" not in log.read_text()


def test_sigterm_ends_it_as_well(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with running(base, folder, "--rounds", "500", "--agents", "1") as process:
        wait_for(folder, r"round 1/\d+ started", process)
        process.terminate()
        assert process.wait(WAIT_S) == 143
        assert relatives(folder) == []


def test_a_demo_that_is_killed_outright_leaves_no_process(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with running(base, folder, "--rounds", "500", "--agents", "1") as process:
        wait_for(folder, r"round 1/\d+ started", process)
        family = relatives(folder)
        process.kill()
        assert all_gone(family)


def test_an_agent_that_dies_is_reported_with_what_it_wrote_last(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with running(base, folder, "--rounds", "500", "--agents", "2") as process:
        wait_for(folder, r"round 1/\d+ started", process)
        agent = next(p for p in relatives(folder) if any("agent-2" in word for word in p.cmdline()))
        agent.kill()
        assert process.wait(WAIT_S) == 8
        assert relatives(folder) == []
    text = folder.with_suffix(".out").read_text()
    assert "agent-2 was ended by signal SIGKILL" in text
    assert "agent-2.log" in text
    assert "Traceback" not in text
