"""Cutting and tuning in turns: what is left, what comes back of it, and what a device knows that begins anew."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from fleetune import architectures, importances, sparsity, structures
from fleetune.agent.methods import fedavg_lora, fedspine
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work
from fleetune.agent.trainer import data, loop
from fleetune.architectures import Layout
from fleetune.errors import DataError, ModelError, NotFiniteError, UnsupportedError, WireError
from fleetune.methods.v1 import echo_pb2, fedspine_pb2
from fleetune.model import adapter, evaluation
from fleetune.model.importance import Importance
from fleetune.model.lora import AdaptedModel
from fleetune.model.slim import layout_of_folder
from fleetune.structures import Structure
from fleetune.v1 import messages_pb2
from fleetune.wire import codec
from support import prunable
from support.adapted import adapted, examples, quiet
from support.child_client import ChildClient
from support.jobs import fedavg_payload, recipe_message, task_message, train_fields
from support.tiny_models import coloured_rows, question_rows, tiny_classifier, tiny_llama, tiny_t5, write_jsonl

RANK = 4
TAU = 3


@dataclass(frozen=True)
class Device:
    """A base, the whole state that a job begins with, rows, and where updates go."""

    base: Path
    recipe: messages_pb2.Recipe
    state: Path
    rows: Path
    layout: Layout

    def work(self, task: fedspine_pb2.FedspineTask, number: int = 1, deadline_s: float = 0.0, state: Path | None = None) -> Work:
        message = task_message("fedspine", task, self.recipe)
        message.round, message.deadline_s = number, deadline_s
        return self.doing(message, self.state.with_name("update.safetensors"), state)

    def doing(self, task: messages_pb2.Task, out: Path, state: Path | None = None) -> Work:
        rows = DataFile(self.rows, None)
        return Work(task, self.base, state or self.state, out, DeviceData(rows, rows), Limits(1, "cpu", None))


@dataclass(frozen=True)
class Done:
    """A finished round."""

    digest: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    report: fedspine_pb2.FedspineReport
    metrics: dict[str, float]
    samples: int
    structure: Structure
    log: list[str]


def payload(before: float = 0.0, after: float = 0.0, structure: bytes = b"", rank: int = 0, **more: float) -> fedspine_pb2.FedspineTask:
    task = fedspine_pb2.FedspineTask(structure=structure, sparsity_before=before, sparsity_after=after, rank=rank)
    task.events, task.tau, task.gathering_steps, task.importance_decay = 2, TAU, 2, 0.9
    task.batch_size, task.gradient_accumulation, task.learning_rate, task.max_grad_norm = 8, 1, 1e-2, 1.0
    for name, value in more.items():
        setattr(task, name, value)
    return task


def trained(device: Device, task: fedspine_pb2.FedspineTask, number: int = 1, deadline_s: float = 0.0) -> Done:
    log: list[str] = []
    work = device.work(task, number, deadline_s)
    result = fedspine.train(work, lambda event, **fields: log.append(str(fields.get("text") or f"{fields['stage']} {fields['total']}")))
    assert work.out_path is not None
    report = fedspine_pb2.FedspineReport()
    assert result.report.payload.Unpack(report)
    return Done(
        result.digest,
        load_file(work.out_path),
        dict(codec.read_table(work.out_path).metadata),
        report,
        {metric.name: metric.value for metric in result.report.metrics},
        int(result.report.samples),
        structures.from_bytes(device.layout, report.structure),
        log,
    )


def device_of(base: Path, folder: Path, model_task: Literal["text-classification", "causal-lm", "seq2seq-lm"]) -> Device:
    layout = layout_of_folder(base)
    recipe = recipe_message(model_task, architectures.target_names(layout), rank=RANK)
    model = adapted(base, recipe)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters:  # B is not zero, so that every part of the state matters
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = coloured_rows() if model_task == "text-classification" else question_rows()
    state = adapter.write_state(folder / "state.safetensors", model).path
    return Device(base, recipe, state, write_jsonl(folder / "rows.jsonl", rows), layout)


@pytest.fixture(scope="module")
def bert_device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("encoder")
    return device_of(tiny_classifier(folder / "base", 2), folder, "text-classification")


@pytest.fixture(scope="module")
def llama_device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("decoder")
    return device_of(tiny_llama(folder / "base"), folder, "causal-lm")


@pytest.fixture(params=["bert", "llama"])
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.getfixturevalue(f"{request.param}_device")
    return found


@pytest.fixture(autouse=True)
def new_child() -> Iterator[None]:
    begin_anew()
    yield
    begin_anew()


def begin_anew() -> None:
    """As a process does that was just started."""
    data.forget()
    fedspine.MEMORIES.clear()


def part(layout: Layout, structure: Structure, rank: int, name: str, whole: torch.Tensor) -> torch.Tensor:
    """What a device has of a tensor, worked out by hand."""
    cut = architectures.tensor_cut(layout, name)
    if cut is not None:
        whole = whole.index_select(cut.axis, torch.tensor(structures.kept_elements(layout, structure, cut)))
    if name.endswith("lora_A.weight"):
        return whole[:rank]
    return whole[:, :rank] if name.endswith("lora_B.weight") else whole


def whole_model_after(device: Device, done: Done, rank: int) -> AdaptedModel:
    """At full size: the state's first directions with the update put where it belongs, and everything masked that was cut."""
    model = adapted(device.base, device.recipe)
    adapter.load_state(model, device.state)
    with torch.no_grad():
        for trainable in model.trainables:
            now, name = trainable.parameter, trainable.name
            if name.endswith("lora_A.weight"):
                now[rank:] = 0.0
            elif name.endswith("lora_B.weight"):
                now[:, rank:] = 0.0
            cut = architectures.tensor_cut(device.layout, name)
            places = None if cut is None else torch.tensor(structures.kept_elements(device.layout, done.structure, cut))
            delta = done.tensors[name]
            if cut is None or places is None:
                now[tuple(slice(size) for size in delta.shape)] += delta
            elif cut.axis == 0:
                now[places, : delta.shape[1]] += delta
            else:
                now[: delta.shape[0], places] += delta
    prunable.mask(model.model, device.layout, done.structure)
    return model


def loss_of(model: AdaptedModel, rows: Path) -> float:
    return float(evaluation.evaluate(model, examples(model, rows).items).metrics["loss"])


# ------------------------------------------------------------------------------------------------------------------ a round


@pytest.mark.parametrize("rank", [RANK, 2])
def test_the_updates_shapes_follow_structure_and_rank(device: Device, rank: int) -> None:
    done = trained(device, payload(after=0.5, rank=rank))
    state = load_file(device.state)
    assert done.tensors.keys() == state.keys()
    for name, whole in state.items():
        assert done.tensors[name].shape == part(device.layout, done.structure, rank, name, whole).shape
        assert float(done.tensors[name].abs().max()) > 0
    assert done.metadata == {
        "fleetune.update": "delta", "fleetune.lora_scale": "2.0", "fleetune.structure": done.report.structure.hex(),
    }  # fmt: skip
    assert any(name.endswith("lora_A.weight") and tensor.shape[0] == rank for name, tensor in done.tensors.items())


def test_a_rounds_end_keeps_of_every_group_what_the_schedule_says(device: Device) -> None:
    done = trained(device, payload(after=0.5))
    kept = [structures.keep_of(group, bits) for group, bits in zip(device.layout.groups, done.structure.kept, strict=True)]
    assert kept == list(sparsity.keeps(device.layout, 0.5))
    assert done.metrics["sparsity"] == pytest.approx(structures.sparsity(device.layout, done.structure))
    assert done.metrics["sparsity"] > 0.3


def test_later_rounds_keep_nothing_that_was_cut_before(device: Device) -> None:
    first = trained(device, payload(after=0.25))
    second = trained(device, payload(0.25, 0.5, first.report.structure), number=2)
    assert structures.nested(second.structure, first.structure)
    structures.check_step(device.layout, first.structure, second.structure)
    assert second.metrics["sparsity"] > first.metrics["sparsity"] > 0


@pytest.mark.parametrize("rank", [RANK, 2])
def test_the_cut_model_computes_what_the_masked_one_does(device: Device, rank: int) -> None:
    done = trained(device, payload(after=0.5, rank=rank))
    assert done.report.loss_after == pytest.approx(loss_of(whole_model_after(device, done, rank), device.rows), abs=2e-5)


def test_an_encoder_with_a_decoder_is_cut_too(tmp_path: Path) -> None:
    device = device_of(tiny_t5(tmp_path / "base"), tmp_path, "seq2seq-lm")
    done = trained(device, payload(after=0.5, rank=2))
    assert done.report.loss_after == pytest.approx(loss_of(whole_model_after(device, done, 2), device.rows), abs=2e-5)
    assert done.metrics["sparsity"] > 0.3


def test_the_loss_before_is_that_of_the_state_as_the_device_has_it(device: Device) -> None:
    done = trained(device, payload(rank=2))
    model = adapted(device.base, device.recipe)
    adapter.load_state(model, device.state)
    with torch.no_grad():
        for trainable in model.trainables:
            if trainable.name.endswith("lora_B.weight"):
                trainable.parameter[:, 2:] = 0.0
    assert done.report.loss_before == pytest.approx(loss_of(model, device.rows), abs=1e-5)


def test_a_round_without_pruning_is_a_round_of_fedavg(bert_device: Device) -> None:
    done = trained(bert_device, payload(max_grad_norm=0.0))
    begin_anew()
    task = task_message("fedavg_lora", fedavg_payload(steps=2 * TAU, batch_size=8), bert_device.recipe)
    fedavg_lora.train(bert_device.doing(task, bert_device.state.with_name("fedavg")), quiet)
    expected = load_file(bert_device.state.with_name("fedavg"))
    for name, tensor in done.tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)
    assert done.structure == structures.whole(bert_device.layout)
    assert (done.report.steps, done.samples, done.report.pruning_s) == (2 * TAU, 2 * TAU * 8, 0.0)


def test_the_report_tells_what_happened(device: Device) -> None:
    done = trained(device, payload(after=0.5))
    report = done.report
    assert report.steps == 2 * TAU
    assert report.parameters == device.layout.prunable_parameters
    assert report.parameters_left == structures.parameters(device.layout, done.structure)
    assert report.step_s > 0
    assert report.pruning_s > 0
    assert report.loss_after < report.loss_before
    expected = {
        "loss": report.mean_loss, "loss_before": report.loss_before, "loss_after": report.loss_after, "update_norm": report.update_norm,
        "step_s": report.step_s, "steps": report.steps, "sparsity": structures.sparsity(device.layout, done.structure),
    }  # fmt: skip
    memory = {name: done.metrics.pop(name) for name in ("peak_bytes", "room_bytes", "prunable_bytes", "rank_bytes")}
    assert done.metrics == pytest.approx(expected)
    assert memory["prunable_bytes"] == 4 * device.layout.prunable_parameters
    pairs = sum(tensor.numel() for name, tensor in load_file(device.state).items() if ".lora_" in name)
    assert memory["rank_bytes"] == 16 * pairs / RANK
    assert min(memory.values()) > 0


def test_importance_is_told_where_it_is_asked_for_and_known(device: Device) -> None:
    task = payload(after=0.25)
    assert "fleetune.importance" not in trained(device, task).metadata
    task.importance = True
    begin_anew()
    done = trained(device, task)
    scores = importances.from_text(device.layout, done.metadata["fleetune.importance"])
    for group, bits, values in zip(device.layout.groups, done.structure.kept, scores, strict=True):
        assert sum(values) == pytest.approx(structures.count(bits), rel=0.05)
        assert not any(values[unit] for unit in set(range(group.units)) - set(structures.units(bits)))
    later = payload(before=0.25, after=0.25, structure=structures.to_bytes(device.layout, done.structure))
    later.importance = True
    assert trained(device, later, number=2).metadata["fleetune.importance"] == done.metadata["fleetune.importance"], "in recovery, too"
    begin_anew()
    anew = trained(device, later, number=3)
    assert "fleetune.importance" in anew.metadata, "a new process gathers it"
    assert (anew.structure, anew.report.steps) == (done.structure, 2 * TAU)


def test_a_round_that_cuts_nothing_gathers_importance_where_it_is_asked_for(device: Device) -> None:
    task = payload()
    task.importance = True
    first = trained(device, task)
    assert first.structure == structures.whole(device.layout)
    assert "fleetune.importance" in first.metadata
    second = trained(device, payload(after=0.25), number=2)
    assert not any("nothing is cut" in line for line in second.log)


@pytest.mark.parametrize("events", [1, 2])
def test_what_matters_least_to_the_fleet_goes_on_a_device_that_knows_nothing_itself(device: Device, events: int) -> None:
    task = payload(after=0.5, events=events)
    rising = [[1.0 + unit / group.units for unit in range(group.units)] for group in device.layout.groups]
    task.fleet_importance = importances.to_text(rising)
    done = trained(device, task)
    keeps = sparsity.keeps(device.layout, 0.5)
    # Of neurons that are told by the same byte its own gradients decide.
    told = importances.from_text(device.layout, task.fleet_importance)
    for group, bits, keep, values in zip(device.layout.groups, done.structure.kept, keeps, told, strict=True):
        gone = set(range(group.units)) - set(structures.units(bits))
        assert len(gone) == group.units - keep.units
        assert max(values[unit] for unit in gone) <= min(values[unit] for unit in structures.units(bits))
    assert (done.report.steps, done.structure.version) == (events * TAU, events)


def test_its_own_importance_decides_among_units_that_matter_alike_to_the_fleet(device: Device) -> None:
    found: list[Structure] = []
    for told in ("", importances.to_text([[1.0] * group.units for group in device.layout.groups])):
        begin_anew()
        gathering = payload()
        gathering.importance = True
        trained(device, gathering)
        cutting = payload(after=0.25, events=1)
        cutting.fleet_importance = told
        found.append(trained(device, cutting, number=2).structure)
    assert found[0] == found[1] != structures.whole(device.layout)


@pytest.mark.parametrize("wrong", ["AAAA", "?" * 40])
def test_a_fleet_importance_of_another_model_is_refused(bert_device: Device, wrong: str) -> None:
    task = payload(after=0.5)
    task.fleet_importance = wrong
    with pytest.raises(WireError, match="importance of units is refused"):
        fedspine.train(bert_device.work(task), quiet)


def test_the_update_norm_is_that_of_the_products(device: Device) -> None:
    done = trained(device, payload(after=0.5, rank=2))
    state, squares = load_file(device.state), 0.0
    for name in (name for name in state if name.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        a, b = (part(device.layout, done.structure, 2, each, state[each]).double() for each in (name, other))
        squares += float((2.0 * ((b + done.tensors[other]) @ (a + done.tensors[name]) - b @ a)).square().sum())
    assert done.report.update_norm == pytest.approx(squares**0.5, rel=1e-6)


@pytest.mark.parametrize("update_dtype", ["bfloat16", "float16"])
def test_the_update_has_the_jobs_type(bert_device: Device, update_dtype: str) -> None:
    task = payload(after=0.25)
    task.update_dtype = update_dtype
    assert {tensor.dtype for tensor in trained(bert_device, task).tensors.values()} == {getattr(torch, update_dtype)}


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"gradient_checkpointing": True}, {"dropout": 0.1}])
def test_bases_of_any_type_and_ways_to_train_them_are_cut(bert_device: Device, changes: dict[str, object]) -> None:
    recipe = recipe_message(targets=architectures.target_names(bert_device.layout), rank=RANK, **changes)  # type: ignore[arg-type]  # as named
    done = trained(replace(bert_device, recipe=recipe), payload(after=0.5))
    assert done.metrics["sparsity"] == pytest.approx(structures.sparsity(bert_device.layout, done.structure))
    assert done.metrics["sparsity"] > 0.3
    assert done.report.loss_after < done.report.loss_before


def test_another_scale_leaves_the_products_what_they_are(bert_device: Device) -> None:
    usual = trained(bert_device, payload(rank=2))
    begin_anew()
    scaled = trained(bert_device, payload(rank=2, scale=4.0))
    assert scaled.metadata["fleetune.lora_scale"] == "4.0"
    assert scaled.report.loss_before == pytest.approx(usual.report.loss_before, abs=1e-6)


# ------------------------------------------------------------------------------------------------------- doing it again


def test_a_task_that_is_done_again_gives_the_same_bytes(device: Device) -> None:
    task = payload(after=0.5, rank=2)
    first = trained(device, task)
    assert trained(device, task).digest == first.digest
    begin_anew()
    assert trained(device, task).digest == first.digest


def test_a_later_round_that_is_done_again_gives_the_same_bytes(device: Device) -> None:
    first = trained(device, payload(after=0.25))
    task = payload(0.25, 0.5, first.report.structure)
    second = trained(device, task, number=2)
    assert trained(device, task, number=2).digest == second.digest


def test_a_new_process_goes_on_from_the_tasks_structure(device: Device) -> None:
    first = trained(device, payload(after=0.25))
    begin_anew()
    second = trained(device, payload(0.25, 0.5, first.report.structure), number=2)
    assert structures.nested(second.structure, first.structure)
    # It has no importance, so it lets the first cut be; a process that has it does not.
    assert second.report.steps == 2 * TAU
    assert second.structure.version == first.structure.version + 1
    third = trained(device, payload(0.5, 0.5, second.report.structure), number=3)
    assert (third.report.steps, third.structure) == (2 * TAU, second.structure)


def test_importance_is_kept_from_round_to_round(device: Device) -> None:
    first = trained(device, payload(after=0.25))
    second = trained(device, payload(0.25, 0.5, first.report.structure), number=2)
    assert [sum("nothing is cut" in line for line in done.log) for done in (first, second)] == [1, 0]


def test_a_first_round_with_one_cut_takes_steps_more_to_know_what_to_cut(device: Device) -> None:
    first = trained(device, payload(after=0.25, events=1))
    assert (first.report.steps, first.structure.version) == (2 + TAU, 1)
    second = trained(device, payload(0.25, 0.5, first.report.structure, events=1), number=2)
    assert (second.report.steps, second.structure.version) == (TAU, 2)


def test_a_device_whose_update_was_lost_begins_where_the_coordinator_says(device: Device) -> None:
    first = trained(device, payload(after=0.25))
    trained(device, payload(0.25, 0.5, first.report.structure), number=2)
    again = trained(device, payload(0.25, 0.3, first.report.structure), number=3)
    assert structures.nested(again.structure, first.structure)
    assert again.structure.version <= first.structure.version + 2
    # What was known before the second round tells of all that the first structure has.
    assert again.report.steps == 2 * TAU


def test_a_model_that_was_cut_is_not_given_to_other_methods(bert_device: Device) -> None:
    trained(bert_device, payload(after=0.5))
    task = task_message("fedavg_lora", fedavg_payload(), bert_device.recipe)
    fedavg_lora.train(bert_device.doing(task, bert_device.state.with_name("fedavg")), quiet)
    shapes = {name: tensor.shape for name, tensor in load_file(bert_device.state).items()}
    assert {name: tensor.shape for name, tensor in load_file(bert_device.state.with_name("fedavg")).items()} == shapes


def test_a_warm_model_with_the_tasks_structure_is_used_on(bert_device: Device) -> None:
    first = trained(bert_device, payload(after=0.25))
    second = trained(bert_device, payload(0.25, 0.5, first.report.structure), number=2)
    third = trained(bert_device, payload(structure=first.report.structure), number=3)
    # The third has a structure from which units were cut since: they come back from the disk alone.
    assert ["loading 1" in done.log for done in (first, second, third)] == [True, False, True]


def test_a_process_that_was_killed_is_replaced_by_one_that_knows_nothing(bert_device: Device, tmp_path: Path) -> None:
    expected = trained(bert_device, payload(after=0.5, rank=2))
    message = bert_device.work(payload(after=0.5, rank=2)).task
    fields = train_fields(message, bert_device.state, tmp_path / "update.safetensors", bert_device.base, bert_device.rows)
    with ChildClient("fleetune.agent.trainer") as child:
        child.send_raw(json.dumps({"id": 1, "op": "train", **fields}).encode() + b"\n")
        child.process.kill()
    with ChildClient("fleetune.agent.trainer") as child:
        answer = child.ask("train", **fields)
    report = messages_pb2.UpdateReport.FromString(base64.b64decode(answer["result"]["report"]))
    told = fedspine_pb2.FedspineReport()
    assert report.payload.Unpack(told)
    assert (told.structure, told.steps) == (expected.report.structure, expected.report.steps)
    found = load_file(tmp_path / "update.safetensors")
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- while it trains


class Watched(fedspine.Pruner):
    """Notes what the optimiser holds after every cut."""

    cuts: list[list[tuple[tuple[int, ...], tuple[int, ...], torch.nn.Parameter, torch.Tensor]]]

    def before(self, step: int, optimiser: torch.optim.Optimizer) -> loop.Word:
        word = super().before(step, optimiser)
        if word == "changed":
            held = [parameter for group in optimiser.param_groups for parameter in group["params"]]
            Watched.cuts.append(
                [(tuple(p.shape), tuple(optimiser.state[p]["exp_avg"].shape), p, p.detach().clone()) for p in held if p in optimiser.state]
            )
        return word


def test_moments_live_on_after_a_cut(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    Watched.cuts = []
    monkeypatch.setattr(fedspine, "Pruner", Watched)
    done = trained(device, payload(after=0.5))
    last = Watched.cuts[-1]
    # Every trained tensor has moments, of its own new shape, and goes on moving.
    assert len(last) == len(done.tensors)
    assert all(shape == moments for shape, moments, _, _ in last)
    assert all(float((parameter.detach() - then).abs().max()) > 0 for _, _, parameter, then in last)


def test_importance_that_is_not_finite_cuts_nothing(bert_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(self: Importance, loss_scale: float = 1.0) -> bool:
        self.skipped += 1
        return False

    monkeypatch.setattr(Importance, "observe", blind)
    done = trained(bert_device, payload(after=0.5))
    assert done.structure == structures.whole(bert_device.layout)
    assert [line for line in done.log if "nothing is cut" in line] == [
        "nothing is cut: nothing is known of this model's gradients yet",
        "nothing is cut: no gradient since the last cut was finite",
    ]
    assert done.report.steps == 2 * TAU
    assert not any(memory.after for memory in fedspine.MEMORIES.values())


def test_a_loss_that_is_not_finite_ends_the_task_and_the_next_one_works(bert_device: Device, tmp_path: Path) -> None:
    model = adapted(bert_device.base, bert_device.recipe)
    with torch.no_grad():
        model.parameters[0].fill_(float("nan"))
    broken = adapter.write_state(tmp_path / "broken.safetensors", model).path
    with pytest.raises(NotFiniteError):
        fedspine.train(bert_device.work(payload(after=0.5), state=broken), quiet)
    assert trained(bert_device, payload(after=0.5)).metrics["sparsity"] > 0.3


def test_a_round_that_would_miss_its_deadline_ends_early(bert_device: Device) -> None:
    done = trained(bert_device, payload(after=0.5), deadline_s=1e-6)
    assert (done.report.steps, done.samples) == (1, 8)
    assert done.structure == structures.whole(bert_device.layout)
    assert any("deadline" in line for line in done.log)


def test_the_steps_that_gather_do_not_move_the_schedule(bert_device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Rates(fedspine.Pruner):
        def observe(self) -> None:
            super().observe()
            seen.append(self.optimiser.param_groups[0]["lr"])

        def before(self, step: int, optimiser: torch.optim.Optimizer) -> loop.Word:
            self.optimiser = optimiser
            return super().before(step, optimiser)

    monkeypatch.setattr(fedspine, "Pruner", Rates)
    task = payload(after=0.25, schedule_offset=6, schedule_total=12, events=1, tau=2 * TAU)
    task.schedule = "linear"
    trained(bert_device, task)
    assert seen == pytest.approx([1e-2 * left for left in (0.5, 0.5, 0.5, 5 / 12, 4 / 12, 3 / 12, 2 / 12, 1 / 12)])


# ------------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_measures_the_cut_model(device: Device) -> None:
    done = trained(device, payload(after=0.5))
    found = fedspine.evaluate(device.work(payload(structure=done.report.structure, rank=1)), quiet)
    model = adapted(device.base, device.recipe)
    adapter.load_state(model, device.state)
    prunable.mask(model.model, device.layout, done.structure)
    assert {metric.name: metric.value for metric in found.metrics}["loss"] == pytest.approx(loss_of(model, device.rows), abs=2e-5)


def test_evaluation_without_a_structure_measures_the_whole_state(device: Device) -> None:
    trained(device, payload(after=0.5, rank=2))
    work = device.work(payload())
    work.task.ClearField("payload")
    model = adapted(device.base, device.recipe)
    adapter.load_state(model, device.state)
    metrics = {metric.name: metric.value for metric in fedspine.evaluate(work, quiet).metrics}
    assert metrics["loss"] == pytest.approx(loss_of(model, device.rows), abs=1e-5)


def test_a_device_without_validation_rows_weighs_nothing(bert_device: Device) -> None:
    work = bert_device.work(payload())
    bare = Work(work.task, work.base_folder, work.state_path, None, DeviceData(DataFile(bert_device.rows, None), None), work.limits)
    assert fedspine.evaluate(bare, quiet).rows == 0


# -------------------------------------------------------------------------------------------------------------- refusals


def foreign(llama_device: Device) -> bytes:
    return structures.to_bytes(llama_device.layout, structures.whole(llama_device.layout))


def test_a_structure_of_another_model_is_refused(bert_device: Device, llama_device: Device) -> None:
    task = payload(structure=foreign(llama_device))
    for call in (fedspine.train, fedspine.evaluate):
        with pytest.raises(ModelError, match="structure does not belong to the base"):
            call(bert_device.work(task), quiet)


@pytest.mark.parametrize("garbage", [b"\0", b"FTST", b"\xff" * 500])
def test_garbage_is_no_structure(bert_device: Device, garbage: bytes) -> None:
    size = structures.size_bytes(bert_device.layout)
    for wrong in (garbage, garbage[:1] * size):
        with pytest.raises(ModelError, match="structure does not belong to the base"):
            trained(bert_device, payload(structure=wrong))


def test_targets_that_leave_a_group_without_importance_are_refused(bert_device: Device, tmp_path: Path) -> None:
    narrow = recipe_message(targets=("query", "value"))
    state = adapter.write_state(tmp_path / "state.safetensors", adapted(bert_device.base, narrow)).path
    with pytest.raises(ModelError, match=r"importance of neurons.*intermediate\.dense"):
        trained(Device(bert_device.base, narrow, state, bert_device.rows, bert_device.layout), payload(after=0.5))


def test_an_architecture_that_is_not_known_is_refused(gpt2: Path, bert_device: Device) -> None:
    with pytest.raises(ModelError, match=r"'gpt2'.*bert.*llama"):
        trained(Device(gpt2, bert_device.recipe, bert_device.state, bert_device.rows, bert_device.layout), payload())


def test_a_state_of_another_job_is_refused(bert_device: Device, llama_device: Device) -> None:
    work = bert_device.work(payload(after=0.5))
    work.task.trainables_digest = "f" * 64
    with pytest.raises(ModelError, match="trainables digest"):
        fedspine.train(work, quiet)
    with pytest.raises(ModelError, match="missing"):
        fedspine.train(bert_device.work(payload(after=0.5), state=llama_device.state), quiet)


def test_a_rank_beyond_the_states_is_refused(bert_device: Device) -> None:
    with pytest.raises(ModelError, match="rank 5 is asked for"):
        trained(bert_device, payload(rank=RANK + 1))


@pytest.mark.parametrize("wrong", [{"before": 0.5, "after": 0.2}, {"after": 1.0}, {"events": 0}, {"tau": 0}, {"importance_decay": 1.0}])
def test_pruning_that_makes_no_sense_is_refused(bert_device: Device, wrong: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="bug of the coordinator"):
        trained(bert_device, payload(**wrong))  # type: ignore[arg-type]  # numbers of the task


def test_another_methods_payload_is_refused(bert_device: Device) -> None:
    work = bert_device.work(payload())
    work.task.payload.Pack(echo_pb2.EchoTask())
    with pytest.raises(UnsupportedError, match="FedspineTask"):
        fedspine.train(work, quiet)


def test_a_device_without_rows_says_so(bert_device: Device) -> None:
    work = bert_device.work(payload())
    bare = Work(work.task, work.base_folder, work.state_path, work.out_path, DeviceData(None, None), work.limits)
    with pytest.raises(DataError, match="only validation rows"):
        fedspine.train(bare, quiet)
