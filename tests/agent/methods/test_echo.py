"""The link test's arithmetic, its file, and what it does not import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from fleetune.agent.methods import echo, table
from fleetune.agent.methods.work import Limits, Work
from fleetune.errors import ModelError, UnsupportedError
from fleetune.v1 import messages_pb2
from fleetune.wire import codec
from support.child_client import ChildClient
from support.jobs import echo_task, encoded, fedavg_payload, task_message, train_fields

LIMITS = Limits(1, "cpu", None)


def _silent(event: str, **fields: object) -> None:
    pass


def _run(task: messages_pb2.Task, state: Path, out: Path | None) -> Work:
    return Work(task, None, state, out, None, LIMITS)


def test_every_tensor_grows_by_the_constant(tmp_path: Path) -> None:
    state = {"b": torch.arange(700_000, dtype=torch.float32), "a": torch.full((3, 5), 2.0), "empty": torch.empty(0)}
    save_file(state, tmp_path / "state")
    trained = echo.train(_run(echo_task(7), tmp_path / "state", tmp_path / "out"), _silent)
    found = load_file(tmp_path / "out")
    assert {name: torch.equal(found[name], state[name] + 7) for name in state} == dict.fromkeys(state, True)
    data = (tmp_path / "out").read_bytes()
    assert (trained.digest, trained.size_bytes) == (blake3(data).hexdigest(), len(data))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8])
def test_sums_are_those_of_the_tensors_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (
        (torch.arange(-50, 50) * 3 + 1).to(torch.float32).mul(1.25).to(dtype) if dtype.is_floating_point else torch.arange(100, dtype=dtype)
    )
    save_file({"a": values}, tmp_path / "state")
    echo.train(_run(echo_task(9), tmp_path / "state", tmp_path / "out"), _silent)
    assert torch.equal(load_file(tmp_path / "out")["a"], values + torch.tensor(9, dtype=dtype))


def test_the_update_declares_full_values_in_name_order(tmp_path: Path) -> None:
    save_file({"z": torch.zeros(2, dtype=torch.float64), "a": torch.zeros(3)}, tmp_path / "state")
    echo.train(_run(echo_task(1), tmp_path / "state", tmp_path / "out"), _silent)
    found = codec.read_table(tmp_path / "out")
    assert found.metadata == {"fleetune.update": "state"}
    assert [spec.name for spec in found.in_file_order] == ["a", "z"]


def test_a_state_of_another_job_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "state")
    task = echo_task(1)
    task.trainables_digest = "f" * 64
    with pytest.raises(ModelError, match="trainables digest"):
        echo.train(_run(task, tmp_path / "state", tmp_path / "out"), _silent)
    assert not (tmp_path / "out").exists()


def test_another_methods_task_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "state")
    with pytest.raises(UnsupportedError, match="EchoTask"):
        echo.train(_run(task_message("echo", fedavg_payload()), tmp_path / "state", tmp_path / "out"), _silent)


def test_every_method_of_the_table_trains_and_evaluates() -> None:
    assert all(callable(table.load(name).train) and callable(table.load(name).evaluate) for name in table.METHODS)


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="deft, echo, fedara, fedavg_lora, fedspine"):
        table.load("fedsgd")


def test_an_echo_child_imports_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "state")
    with ChildClient("fleetune.agent.trainer") as child:
        assert child.ask("ping")["result"]["heavy_modules"] == []
        answer = child.ask("train", **train_fields(echo_task(3), tmp_path / "state", tmp_path / "out"))
        report = messages_pb2.UpdateReport.FromString(_bytes(answer["result"]["report"]))
        assert report.samples == 1
        assert np.array_equal(load_file(tmp_path / "out")["a"].numpy(), np.full(4, 3.0, np.float32))
        assert child.ask("ping")["result"]["heavy_modules"] == ["numpy"]
        evaluated = child.ask("evaluate", **train_fields(echo_task(3), tmp_path / "state", None))
        assert messages_pb2.Evaluation.FromString(_bytes(evaluated["result"]["evaluation"])).rows == 1


def _bytes(text: str) -> bytes:
    import base64

    return base64.b64decode(text)


def test_encoded_tasks_survive_the_way_to_the_child() -> None:
    assert messages_pb2.Task.FromString(_bytes(encoded(echo_task(5)))) == echo_task(5)
