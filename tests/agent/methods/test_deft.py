"""Blocks by depth: their gradients, their deltas, and what is kept of the layers below them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fleetune.agent.methods import deft
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Trained, Work
from fleetune.agent.trainer import loop
from fleetune.errors import DataError, ModelError, NotFiniteError, UnsupportedError
from fleetune.methods.v1 import deft_pb2, echo_pb2
from fleetune.model import adapter, depths
from fleetune.model.batches import Example, collate, endless_order
from fleetune.model.lora import AdaptedModel
from fleetune.v1 import messages_pb2
from fleetune.wire import codec
from support.adapted import adapted, examples, quiet
from support.jobs import recipe_message, task_message
from support.tiny_models import coloured_rows, tiny_classifier, write_jsonl

LAYERS = 3
DEPTHS = LAYERS + 1
ROWS = 16
GRADIENT = deft_pb2.DEFT_PAYLOAD_GRADIENT
DELTA = deft_pb2.DEFT_PAYLOAD_DELTA


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("base"), LAYERS)


@pytest.fixture(scope="module")
def model(base: Path) -> AdaptedModel:
    return adapted(base, recipe_message())


@pytest.fixture
def state(model: AdaptedModel, tmp_path: Path) -> Path:
    return adapter.write_state(tmp_path / "state.safetensors", model).path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", coloured_rows(ROWS))


def payload(wanted: Sequence[int], kind: deft_pb2.DeftPayload.ValueType = GRADIENT, **more: float) -> deft_pb2.DeftTask:
    task = deft_pb2.DeftTask(depths=wanted, depth_count=DEPTHS, payload=kind, batch_size=8, gradient_accumulation=1, steps=1)
    task.learning_rate = 1e-2
    for name, value in more.items():
        setattr(task, name, value)
    return task


def trained(
    base: Path,
    state: Path,
    rows: Path | None,
    task: deft_pb2.DeftTask,
    recipe: messages_pb2.Recipe | None = None,
    memory_bytes: int | None = None,
) -> tuple[Trained, dict[str, torch.Tensor], deft_pb2.DeftReport]:
    out = state.with_name(f"update-{'-'.join(map(str, task.depths))}.safetensors")
    data = DeviceData(DataFile(rows, None) if rows is not None else None, None)
    work = Work(task_message("deft", task, recipe or recipe_message()), base, state, out, data, Limits(1, "cpu", memory_bytes))
    result = deft.train(work, quiet)
    report = deft_pb2.DeftReport()
    assert result.report.payload.Unpack(report)
    return result, load_file(out), report


def kind_of(base: Path, state: Path, rows: Path, task: deft_pb2.DeftTask) -> object:
    trained(base, state, rows, task)
    return codec.read_table(state.with_name(f"update-{'-'.join(map(str, task.depths))}.safetensors")).metadata


def full_gradient(model: AdaptedModel, rows: Path, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """By torch alone, of one batch."""
    items = examples(model, rows).items
    batch = collate([items[index] for index in chosen], model.tokenizer.pad_token_id, model.accelerator.device)
    model.model.zero_grad(set_to_none=True)
    model.model.train()
    model.model(**batch).loss.backward()
    gradients = {trainable.name: trainable.parameter.grad.clone() for trainable in model.trainables if trainable.parameter.grad is not None}
    model.model.zero_grad(set_to_none=True)
    return gradients


def perturbed(model: AdaptedModel, path: Path) -> Path:
    """A state whose B matrices are not zero: else those of A have no gradient."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter.write_state(path, model).path


def first_rows(count: int, first: int = 0, seed: int = 0) -> list[int]:
    order = endless_order(ROWS, f"deft/{seed}", first)
    return [next(order) for _ in range(count)]


def test_the_blocks_gradients_put_together_are_the_full_gradient(base: Path, rows: Path, tmp_path: Path) -> None:
    model = adapted(base, recipe_message())
    state = perturbed(model, tmp_path / "state.safetensors")
    together: dict[str, torch.Tensor] = {}
    for depth in range(1, DEPTHS + 1):
        together |= trained(base, state, rows, payload([depth]))[1]
    expected = full_gradient(model, rows, first_rows(8))
    assert together.keys() == expected.keys()
    assert any("classifier" in name for name in together)
    for name, gradient in expected.items():
        assert float((together[name] - gradient).abs().max()) <= 1e-6
        assert float(gradient.abs().max()) > 0


def test_several_depths_at_once_give_the_same_gradients(base: Path, rows: Path, tmp_path: Path) -> None:
    state = perturbed(adapted(base, recipe_message()), tmp_path / "state.safetensors")
    both = trained(base, state, rows, payload([2, 3]))[1]
    for depth in (2, 3):
        for name, gradient in trained(base, state, rows, payload([depth]))[1].items():
            torch.testing.assert_close(both[name], gradient, atol=1e-6, rtol=0)


def test_an_accumulated_gradient_is_that_of_one_batch(base: Path, rows: Path, tmp_path: Path) -> None:
    state = perturbed(adapted(base, recipe_message()), tmp_path / "state.safetensors")
    whole = trained(base, state, rows, payload([1, 2], batch_size=8))
    # 3, 3 and 2 rows.
    parts = trained(base, state, rows, payload([1, 2], batch_size=3, gradient_accumulation=3))
    ninth = trained(base, state, rows, payload([1, 2], batch_size=9))
    assert (whole[0].report.samples, parts[0].report.samples) == (8, 9)
    assert (whole[2].batch_size, parts[2].batch_size) == (8, 3)
    for name, gradient in ninth[1].items():
        torch.testing.assert_close(parts[1][name], gradient, atol=1e-6, rtol=0)


def test_where_memory_is_short_fewer_rows_at_once_give_the_same_gradient(base: Path, rows: Path, tmp_path: Path) -> None:
    state = perturbed(adapted(base, recipe_message()), tmp_path / "state.safetensors")
    roomy = trained(base, state, rows, payload([2]))
    tight = trained(base, state, rows, payload([2]), memory_bytes=1)
    assert (roomy[2].batch_size, tight[2].batch_size) == (8, 1)
    for name, gradient in roomy[1].items():
        torch.testing.assert_close(tight[1][name], gradient, atol=1e-6, rtol=0)


def test_an_update_holds_the_tensors_of_its_blocks_and_says_what_it_is(base: Path, state: Path, rows: Path, model: AdaptedModel) -> None:
    blocks = depths.depth_blocks(model)
    _, tensors, _ = trained(base, state, rows, payload([1, 3]))
    assert sorted(tensors) == sorted((*blocks[0].tensor_names, *blocks[2].tensor_names))
    assert kind_of(base, state, rows, payload([1])) == {"fleetune.update": "gradient"}
    assert kind_of(base, state, rows, payload([1], DELTA)) == {"fleetune.update": "delta"}


def test_depth_one_is_the_head_and_the_next_the_last_layer(base: Path, state: Path, rows: Path) -> None:
    assert all("classifier" in name for name in trained(base, state, rows, payload([1]))[1])
    assert all(f"layer.{LAYERS - 1}." in name for name in trained(base, state, rows, payload([2]))[1])
    assert all("layer.0." in name for name in trained(base, state, rows, payload([DEPTHS]))[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_makes_inputs_require_gradients(base: Path, checkpointing: bool) -> None:
    model = adapted(base, recipe_message(gradient_checkpointing=checkpointing))
    model.model.train()
    seen: list[bool] = []
    hook = model.model.get_input_embeddings().register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    model.model(input_ids=torch.ones(2, 8, dtype=torch.long), labels=torch.zeros(2, dtype=torch.long))
    hook.remove()
    assert seen == [False]


def test_what_a_step_keeps_grows_with_the_block_it_trains(model: AdaptedModel) -> None:
    batch = {"input_ids": torch.ones(4, 16, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}
    model.model.train()
    kept: list[int] = []
    for block in depths.depth_blocks(model):
        with depths.training_only(model, [block]):
            kept.append(depths.saved_bytes(model, batch))
    assert kept == sorted(set(kept))


def test_a_gradient_leaves_no_trace_in_the_model(base: Path, state: Path, rows: Path) -> None:
    once = trained(base, state, rows, payload([1, 2]))[1]
    again = trained(base, state, rows, payload([1, 2]))[1]
    assert once.keys() == again.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(again[name], gradient, atol=0, rtol=0)


def test_a_delta_is_how_the_blocks_move_in_local_steps(base: Path, state: Path, rows: Path) -> None:
    model = adapted(base, recipe_message())
    adapter.load_state(model, state)
    block = depths.depth_blocks(model)[1]
    items = examples(model, rows).items
    start = [parameter.detach().clone() for parameter in block.parameters]
    plan = loop.Plan(24, 8, 8, lambda _: 1e-2, 0.0, 0.0, 0.0, "7/1", None, "deft/0", 0)
    with depths.training_only(model, [block]):
        loop.train(model, items, plan, quiet, parameters=block.parameters)
    result, tensors, report = trained(base, state, rows, payload([2], DELTA, steps=3))
    assert (report.steps, result.report.samples) == (3, 24)
    for name, parameter, anchor in zip(block.tensor_names, block.parameters, start, strict=True):
        torch.testing.assert_close(tensors[name], parameter.detach() - anchor, atol=1e-7, rtol=0)
    assert report.update_norm > 0


def test_consecutive_rounds_go_through_all_rows(
    base: Path, state: Path, rows: Path, model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    gradient = loop.gradient

    def watched(adapted: AdaptedModel, items: Sequence[Example], plan: loop.Plan, *more: object) -> loop.Outcome:
        order = endless_order(len(items), plan.order_seed, plan.first_row)
        drawn.extend(next(order) for _ in range(plan.total_rows))
        return gradient(adapted, items, plan, *more)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(loop, "gradient", watched)
    for step in range(4):
        trained(base, state, rows, payload([1], first_step=step, order_seed=3))
    assert sorted(drawn[:ROWS]) == list(range(ROWS))
    assert sorted(drawn[ROWS:]) == list(range(ROWS))
    assert drawn[:ROWS] != drawn[ROWS:]
    assert drawn == first_rows(2 * ROWS, seed=3)


def test_the_report_tells_time_memory_and_loss(base: Path, state: Path, rows: Path) -> None:
    result, _, report = trained(base, state, rows, payload([1]))
    assert report.steps == 1
    assert report.step_s > 0
    assert report.mean_loss > 0
    assert {metric.name for metric in result.report.metrics} == {"loss"}
    assert {metric.name for metric in result.report.seconds} == {"load", "train", "write"}


@pytest.mark.parametrize("wanted", [[], [0], [DEPTHS + 1], [2, 1], [1, 1]])
def test_depths_that_the_model_does_not_have_are_refused(base: Path, state: Path, rows: Path, wanted: list[int]) -> None:
    with pytest.raises(ModelError, match=f"from 1 to {DEPTHS}"):
        trained(base, state, rows, payload(wanted))


def test_both_sides_must_count_the_same_depths(base: Path, state: Path, rows: Path) -> None:
    with pytest.raises(ModelError, match=r"head, layer\.2"):
        trained(base, state, rows, payload([1], depth_count=DEPTHS + 1))


def test_another_methods_payload_is_refused(base: Path, state: Path, rows: Path) -> None:
    task = task_message("deft", echo_pb2.EchoTask(), recipe_message())
    work = Work(task, base, state, state.with_name("u"), DeviceData(DataFile(rows, None), None), Limits(1, "cpu", None))
    with pytest.raises(UnsupportedError, match="DeftTask"):
        deft.train(work, quiet)


def test_a_device_without_rows_says_so(base: Path, state: Path) -> None:
    with pytest.raises(DataError, match="only validation rows"):
        trained(base, state, None, payload([1]))


@pytest.mark.parametrize("kind", [GRADIENT, DELTA])
def test_a_gradient_that_is_not_finite_ends_the_task(
    base: Path, state: Path, rows: Path, tmp_path: Path, kind: deft_pb2.DeftPayload.ValueType
) -> None:
    model = adapted(base, recipe_message())
    with torch.no_grad():
        next(one for one in model.trainables if one.name.endswith("classifier.weight")).parameter.fill_(float("nan"))
    broken = adapter.write_state(tmp_path / "broken.safetensors", model).path
    with pytest.raises(NotFiniteError):
        trained(base, broken, rows, payload([1], kind))
