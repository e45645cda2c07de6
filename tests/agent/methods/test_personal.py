"""B and head are the device's own: they never leave it, are there after a restart, and are begun anew where they are lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.agent.methods import fedavg_lora, personal
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work
from fleetune.agent.trainer import data
from fleetune.errors import UnsupportedError
from fleetune.model import adapter
from support.adapted import adapted
from support.jobs import fedavg_payload, recipe_message, task_message

JOB = "job-1"
ANEW = "begin as the job's first state has them"


class Device:
    """Rounds of one device; a new process each time, as far as a method can tell."""

    def __init__(self, base: Path, rows: Path, folder: Path) -> None:
        self.base, self.rows, self.folder = base, rows, folder
        self.state = folder / "state.safetensors"
        self.kept = folder / "personal"
        self.log: list[str] = []
        adapter.write_state(self.state, adapted(base, recipe_message()))

    def work(self, number: int, keep: bool = True) -> Work:
        payload = fedavg_payload(steps=3)
        payload.personal, payload.learning_rate = True, 0.01
        task = task_message("fedavg_lora", payload, recipe_message())
        task.job_id, task.round = JOB, number
        places = DeviceData(DataFile(self.rows, None), DataFile(self.rows, None))
        out = self.folder / "update.safetensors"
        return Work(task, self.base, self.state, out, places, Limits(1, "cpu", None), self.kept if keep else None)

    def train(self, number: int) -> dict[str, torch.Tensor]:
        data.forget()
        fedavg_lora.train(self.work(number), self._emit)
        return load_file(self.folder / "update.safetensors")

    def evaluate(self, number: int) -> dict[str, float]:
        data.forget()
        return {metric.name: metric.value for metric in fedavg_lora.evaluate(self.work(number), self._emit).metrics}

    def file(self, number: int) -> Path:
        return self.kept / JOB / f"{number:04d}.safetensors"

    def _emit(self, event: str, **fields: object) -> None:
        if event == "log":
            self.log.append(str(fields["text"]))


@pytest.fixture
def device(bert: Path, rows_file: Path, tmp_path: Path) -> Device:
    return Device(bert, rows_file, tmp_path)


def test_b_and_head_never_leave_the_device(device: Device) -> None:
    sent = device.train(1)
    state = load_file(device.state)
    assert set(sent) == {name for name in state if name.endswith(".lora_A.weight")}
    own = load_file(device.file(1))
    assert set(own) == set(state)
    changed = {name for name in state if not torch.equal(own[name], state[name])}
    assert any(name.endswith(".lora_B.weight") for name in changed)
    assert any("classifier" in name for name in changed)


def test_what_is_sent_and_kept_for_square_matrices_is_half_of_all(device: Device) -> None:
    sent = sum(tensor.numel() for tensor in device.train(1).values())
    pairs = {name: tensor.numel() for name, tensor in load_file(device.state).items() if ".lora_" in name}
    assert sent <= 0.51 * sum(pairs.values())


def test_a_round_goes_on_from_what_the_device_kept(device: Device) -> None:
    device.train(1)
    assert [line for line in device.log if ANEW in line], "its first round"
    device.log.clear()
    device.train(2)
    with_own = load_file(device.file(2))
    assert not [line for line in device.log if ANEW in line]
    device.file(1).unlink()
    device.train(2)
    begun_anew = load_file(device.file(2))
    assert any(not torch.equal(with_own[name], begun_anew[name]) for name in with_own if not personal.is_shared(name))


def test_a_round_that_is_done_again_gives_the_same_bytes(device: Device) -> None:
    device.train(1)
    one = device.train(4)
    again = device.train(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert sum(ANEW in line for line in device.log) == 1


@pytest.mark.parametrize("damage", ["gone", "torn", "nan", "other"])
def test_what_is_lost_begins_anew_and_is_named(device: Device, damage: str) -> None:
    device.train(1)
    path = device.file(1)
    tensors = load_file(path)
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nan":
        save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}, path)
    else:
        save_file({name: torch.zeros(2) for name in tensors}, path)
    device.log.clear()
    device.train(2)
    (line,) = [line for line in device.log if ANEW in line]
    assert damage == "gone" or "of round 1 are lost" in line
    assert device.file(2).is_file()


def test_each_device_measures_its_own_model(device: Device) -> None:
    device.train(1)
    own = device.evaluate(1)
    device.file(1).unlink()
    assert device.evaluate(1) != own


def test_a_crash_before_the_rename_leaves_the_round_before(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.train(1)
    before = device.file(1).read_bytes()

    def cut(source: object, target: object) -> None:
        raise OSError("power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(OSError, match="power"):
            device.train(2)
    assert device.file(1).read_bytes() == before
    assert not device.file(2).exists()


def test_the_last_two_rounds_and_the_last_jobs_stay(device: Device) -> None:
    for number in (1, 3, 7):
        device.train(number)
    assert sorted(path.name for path in (device.kept / JOB).iterdir()) == ["0003.safetensors", "0007.safetensors"]
    model = adapted(device.base, recipe_message())
    for job in range(personal.JOBS_KEPT + 3):
        personal.keep(device.kept, f"other/../{job}", model, 1)
    assert len(list(device.kept.iterdir())) == personal.JOBS_KEPT
    assert sorted(path.name for path in device.folder.iterdir()) == ["personal", "state.safetensors", "update.safetensors"]


def test_an_agent_that_has_no_place_for_it_says_so(device: Device) -> None:
    with pytest.raises(UnsupportedError, match="no folder is given"):
        fedavg_lora.train(device.work(1, keep=False), device._emit)  # pyright: ignore[reportPrivateUsage]
