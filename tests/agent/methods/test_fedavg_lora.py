"""Local training of one round: the delta, its file, its report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fleetune.agent.methods import fedavg_lora
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Trained, Work
from fleetune.errors import DataError, ModelError, NotFiniteError
from fleetune.methods.v1 import fedavg_lora_pb2
from fleetune.model import adapter
from fleetune.v1 import messages_pb2
from fleetune.wire import codec
from support.adapted import adapted, quiet
from support.jobs import fedavg_payload, recipe_message, task_message
from support.tiny_models import write_jsonl

LIMITS = Limits(1, "cpu", None)


@pytest.fixture
def state(bert: Path, tmp_path: Path) -> Path:
    adapter.write_state(tmp_path / "state.safetensors", adapted(bert, recipe_message()))
    return tmp_path / "state.safetensors"


def _work(
    base: Path,
    state: Path,
    rows: Path,
    payload: fedavg_lora_pb2.FedavgLoraTask,
    recipe: messages_pb2.Recipe | None = None,
    validation: Path | None = None,
    digest: str = "",
) -> Work:
    data = DeviceData(DataFile(rows, None), DataFile(validation, None) if validation is not None else None)
    task = task_message("fedavg_lora", payload, recipe or recipe_message(), digest)
    return Work(task, base, state, state.with_name("update.safetensors"), data, LIMITS)


def _report(trained: Trained) -> fedavg_lora_pb2.FedavgLoraReport:
    report = fedavg_lora_pb2.FedavgLoraReport()
    assert trained.report.payload.Unpack(report)
    return report


def test_the_delta_covers_the_states_tensors_and_is_reported(bert: Path, state: Path, rows_file: Path) -> None:
    work = _work(bert, state, rows_file, fedavg_payload())
    trained = fedavg_lora.train(work, quiet)
    before, delta = load_file(state), load_file(state.with_name("update.safetensors"))
    assert before.keys() == delta.keys()
    table = codec.read_table(state.with_name("update.safetensors"))
    assert table.metadata == {"fleetune.update": "delta"}
    norm = torch.cat([tensor.flatten() for tensor in delta.values()]).norm()
    assert _report(trained).update_norm == pytest.approx(float(norm), rel=1e-5)
    assert trained.report.samples == 32
    assert trained.report.peak_rss_bytes > 0


def test_a_round_does_not_depend_on_the_rounds_before_it(bert: Path, state: Path, rows_file: Path) -> None:
    first = fedavg_lora.train(_work(bert, state, rows_file, fedavg_payload()), quiet)
    second = fedavg_lora.train(_work(bert, state, rows_file, fedavg_payload()), quiet)
    assert first.digest == second.digest


@pytest.mark.parametrize(("update_dtype", "word"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_update_has_the_jobs_type(bert: Path, state: Path, rows_file: Path, update_dtype: str, word: str) -> None:
    fedavg_lora.train(_work(bert, state, rows_file, fedavg_payload(update_dtype=update_dtype)), quiet)
    assert {spec.dtype for spec in codec.read_table(state.with_name("update.safetensors")).specs} == {word}


def test_epochs_count_every_row_once_per_pass(bert: Path, state: Path, rows_file: Path) -> None:
    trained = fedavg_lora.train(_work(bert, state, rows_file, fedavg_payload(steps=0, epochs=2.0)), quiet)
    assert trained.report.samples == 48
    assert _report(trained).steps == 6


def test_a_device_with_few_rows_takes_smaller_steps(bert: Path, state: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "few.jsonl", [{"text": "the red lamp", "label": "red"}, {"text": "the sea", "label": "blue"}])
    trained = fedavg_lora.train(_work(bert, state, rows, fedavg_payload(steps=3)), quiet)
    assert trained.report.samples == 6


def test_a_step_is_batch_size_times_accumulation(bert: Path, state: Path, rows_file: Path) -> None:
    one = fedavg_lora.train(_work(bert, state, rows_file, fedavg_payload(batch_size=8)), quiet)
    before = load_file(state.with_name("update.safetensors"))
    two = fedavg_lora.train(_work(bert, state, rows_file, fedavg_payload(batch_size=4, gradient_accumulation=2)), quiet)
    after = load_file(state.with_name("update.safetensors"))
    assert one.report.samples == two.report.samples
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def test_an_update_too_large_for_its_type_is_not_finite(bert: Path, state: Path, tmp_path: Path) -> None:
    model = adapted(bert, recipe_message())
    anchors = [parameter.detach() - 1e6 for parameter in model.parameters]
    with pytest.raises(NotFiniteError, match="float16"):
        fedavg_lora.write_delta(tmp_path / "update", model, anchors, "float16")
    assert not (tmp_path / "update").exists()


def test_a_state_with_another_digest_is_refused(bert: Path, state: Path, rows_file: Path) -> None:
    with pytest.raises(ModelError, match="trainables digest"):
        fedavg_lora.train(_work(bert, state, rows_file, fedavg_payload(), digest="f" * 64), quiet)


def test_a_device_without_the_data_says_so(bert: Path, state: Path, rows_file: Path) -> None:
    work = _work(bert, state, rows_file, fedavg_payload())
    with pytest.raises(DataError, match="colours"):
        fedavg_lora.train(Work(work.task, bert, state, work.out_path, None, LIMITS), quiet)


def test_evaluation_counts_the_jobs_bound_of_rows(bert: Path, state: Path, rows_file: Path) -> None:
    work = _work(bert, state, rows_file, fedavg_payload(), recipe_message(evaluation_rows=5), rows_file)
    found = fedavg_lora.evaluate(work, quiet)
    assert found.rows == 5
    assert {metric.name for metric in found.metrics} == {"loss", "accuracy", "macro_f1"}


def test_a_device_without_validation_rows_weighs_nothing(bert: Path, state: Path, rows_file: Path) -> None:
    assert fedavg_lora.evaluate(_work(bert, state, rows_file, fedavg_payload()), quiet).rows == 0


def test_rows_that_changed_are_read_again(bert: Path, state: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the red lamp", "label": "red"}])
    one_row = fedavg_lora.train(_work(bert, state, rows, fedavg_payload(steps=1)), quiet)
    write_jsonl(rows, [{"text": "the red lamp", "label": "red"}, {"text": "the sea", "label": "blue"}])
    two_rows = fedavg_lora.train(_work(bert, state, rows, fedavg_payload(steps=1)), quiet)
    assert (one_row.report.samples, two_rows.report.samples) == (1, 2)
