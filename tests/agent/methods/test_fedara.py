"""Local steps on triplets: what comes back of those that are alive, and how they are scored."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fleetune.agent.methods import fedara, fedavg_lora
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work
from fleetune.agent.trainer import data
from fleetune.errors import DataError, ModelError, UnsupportedError
from fleetune.methods.v1 import echo_pb2, fedara_pb2
from fleetune.model import adapter, recipe, svdadapter, triplets
from fleetune.v1 import messages_pb2
from fleetune.wire import codec
from support.adapted import CPU, adapted, quiet
from support.jobs import fedavg_payload, recipe_message, task_message
from support.tiny_models import coloured_rows, tiny_classifier, write_jsonl

ALL = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
LOWER = "bert.encoder.layer.0.attention.self.query"
UPPER = "bert.encoder.layer.1.attention.self.value"
SCALE = 8.0


@dataclass(frozen=True)
class Device:
    base: Path
    rows: Path
    folder: Path
    recipe: messages_pb2.Recipe

    def state(self, ranks: dict[str, int] | None = None) -> Path:
        model = triplets.load(self.base, recipe.from_proto(self.recipe), CPU, seed=1)
        if ranks is not None:
            model.fit(ranks)
        return adapter.write_state(self.folder / f"state-{len(model.adapters)}", model.adapted).path

    def work(self, payload: fedara_pb2.FedaraTask, state: Path, out: str = "update") -> Work:
        digest = codec.trainables_digest(codec.read_table(state))
        task = task_message("fedara", payload, self.recipe, digest)
        rows = DataFile(self.rows, None)
        return Work(task, self.base, state, self.folder / out, DeviceData(rows, rows), Limits(1, "cpu", None))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("device")
    rows = write_jsonl(folder / "rows.jsonl", coloured_rows())
    return Device(tiny_classifier(folder / "base"), rows, folder, recipe_message(targets=ALL))


def payload(state: Path, **more: float) -> fedara_pb2.FedaraTask:
    task = fedara_pb2.FedaraTask(ranks=triplets.ranks_of(codec.read_table(state)), scale=SCALE)
    task.steps, task.batch_size, task.learning_rate, task.max_grad_norm = 6, 8, 2e-2, 1.0
    for name, value in more.items():
        setattr(task, name, value)
    return task


def report_of(work: Work) -> tuple[fedara_pb2.FedaraReport, int]:
    done = fedara.train(work, quiet)
    report = fedara_pb2.FedaraReport()
    assert done.report.payload.Unpack(report)
    return report, done.size_bytes


def scores_of(report: fedara_pb2.FedaraReport) -> dict[str, tuple[float, ...]]:
    return {item.module: struct.unpack(f"<{len(item.float16) // 2}e", item.float16) for item in report.scores}


def test_an_update_holds_what_is_alive_and_nothing_else(device: Device) -> None:
    state = device.state({LOWER: 1, UPPER: 3})
    work = device.work(payload(state), state)
    report, _ = report_of(work)
    assert work.out_path is not None
    update, before = load_file(work.out_path), load_file(state)
    assert {name: value.shape for name, value in update.items()} == {name: value.shape for name, value in before.items()}
    assert any(bool(value.abs().max() > 0) for name, value in update.items() if name.endswith(".lora_B"))
    assert {name: len(values) for name, values in scores_of(report).items()} == {LOWER: 1, UPPER: 3}
    assert report.steps == report.scored_steps == 6


def test_scores_are_numbers_whose_mean_is_one(device: Device) -> None:
    state = device.state()
    report, _ = report_of(device.work(payload(state), state))
    values = [value for of in scores_of(report).values() for value in of]
    assert len(values) == 12 * 4
    assert all(math.isfinite(value) and value >= 0 for value in values)
    assert math.fsum(values) / len(values) == pytest.approx(1.0, rel=1e-2)
    assert [item.module for item in report.scores] == sorted(item.module for item in report.scores)


def test_bytes_fall_with_the_ranks(device: Device) -> None:
    sizes: list[int] = []
    for ranks in (dict.fromkeys((LOWER, UPPER), 4), dict.fromkeys((LOWER, UPPER), 2), {UPPER: 2}):
        state = device.state(ranks)
        sizes.append(report_of(device.work(payload(state, update_dtype="float16"), state))[1])  # type: ignore[arg-type]
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_same_task_gives_the_same_bytes(device: Device) -> None:
    state = device.state()
    digests = {fedara.train(device.work(payload(state, orthogonality=0.1), state, name), quiet).digest for name in ("one", "two")}
    data.forget()
    digests.add(fedara.train(device.work(payload(state, orthogonality=0.1), state, "three"), quiet).digest)
    assert len(digests) == 1


def test_the_penalty_brings_the_factors_nearer_to_orthonormal(device: Device) -> None:
    state = device.state()
    after: list[float] = []
    for strength in (0.0, 100.0):
        work = device.work(payload(state, orthogonality=strength, steps=20), state)
        fedara.train(work, quiet)
        _, model = data.triplet_session(work.task, work.base_folder, "cpu", 1, quiet)
        after.append(float(svdadapter.orthogonality(model.adapters).detach()))
    assert after[1] < 0.9 * after[0]


def test_the_penalty_is_no_part_of_the_scores(device: Device) -> None:
    state = device.state()
    one, other = (report_of(device.work(payload(state, orthogonality=strength, steps=1), state))[0] for strength in (0.0, 100.0))
    assert scores_of(one) == scores_of(other)


def test_training_teaches(device: Device) -> None:
    state = device.state()
    report, _ = report_of(device.work(payload(state, steps=60), state))
    assert report.last_loss < 0.7 * math.log(3)


def test_an_evaluation_goes_by_the_ranks_of_its_state(device: Device) -> None:
    state = device.state({UPPER: 2})
    found = fedara.evaluate(device.work(payload(state), state), quiet)
    assert found.rows == len(coloured_rows())
    assert {metric.name for metric in found.metrics} >= {"loss", "accuracy"}


def test_a_model_with_triplets_is_not_taken_for_one_with_pairs(device: Device) -> None:
    state = device.state()
    report_of(device.work(payload(state), state))
    model = adapted(device.base, device.recipe)
    pairs = adapter.write_state(device.folder / "pairs", model).path
    task = task_message("fedavg_lora", fedavg_payload(), device.recipe)
    rows = DataFile(device.rows, None)
    fedavg_lora.train(Work(task, device.base, pairs, device.folder / "out", DeviceData(rows, rows), Limits(1, "cpu", None)), quiet)
    report_of(device.work(payload(state), state))


@pytest.mark.parametrize("ranks", [{LOWER: 2}, {LOWER: 1, UPPER: 3, "bert.x": 1}, {LOWER: 1}])
def test_a_task_of_other_ranks_than_its_state_is_refused(device: Device, ranks: dict[str, int]) -> None:
    state = device.state({LOWER: 1, UPPER: 3})
    task = payload(state)
    task.ranks.clear()
    task.ranks.update(ranks)
    with pytest.raises(ModelError, match=r"The task gives .* the rank \d+, the state has \d"):
        fedara.train(device.work(task, state), quiet)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": math.nan}, {"orthogonality": -1.0}])
def test_a_task_with_impossible_numbers_is_refused(device: Device, wrong: dict[str, float]) -> None:
    state = device.state()
    with pytest.raises(ModelError, match="scale"):
        fedara.train(device.work(payload(state, **wrong), state), quiet)


def test_another_methods_task_and_a_state_of_other_tensors_are_refused(device: Device) -> None:
    state = device.state()
    work = device.work(payload(state), state)
    work.task.payload.Pack(echo_pb2.EchoTask(constant=1))
    with pytest.raises(UnsupportedError, match="FedaraTask is expected"):
        fedara.train(work, quiet)
    work = device.work(payload(state), state)
    work.task.trainables_digest = "0" * 64
    with pytest.raises(ModelError, match="trainables digest"):
        fedara.train(work, quiet)


def test_a_device_without_rows_says_so(device: Device) -> None:
    state = device.state()
    work = device.work(payload(state), state)
    with pytest.raises(DataError, match="no rows"):
        fedara.train(Work(work.task, work.base_folder, state, work.out_path, None, work.limits), quiet)


def test_scores_without_any_gradient_are_all_nothing() -> None:
    assert [item.float16 for item in fedara.packed({"b": [0.0], "a": [0.0, 0.0]})] == [b"\0" * 4, b"\0" * 2]
    assert [item.float16 for item in fedara.packed({"a": [math.inf]})] == [b"\0" * 2]


def test_scores_far_below_the_least_float16_keep_their_order() -> None:
    (item,) = fedara.packed({"a": [1e-12, 3e-12]})
    assert struct.unpack("<2e", item.float16) == (0.5, 1.5)
