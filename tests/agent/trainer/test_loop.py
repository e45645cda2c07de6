"""Optimiser steps: accumulation, memory, the proximal pull, and what is told on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fleetune.agent.trainer import loop
from fleetune.errors import NotFiniteError
from fleetune.model.batches import Batch
from fleetune.model.lora import AdaptedModel
from support.adapted import adapted, examples, quiet
from support.jobs import recipe_message

PLAN = loop.Plan(
    total_rows=24,
    step_rows=8,
    micro_rows=8,
    rate=lambda step: 1e-2,
    weight_decay=0.0,
    max_grad_norm=0.0,
    proximal_mu=0.0,
    seed="1/1",
    memory_bytes=None,
)
LM = {"input": "input", "target": "target"}


def _values(model: AdaptedModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters])


def _trained(base: Path, rows: Path, plan: loop.Plan, message: object = None, **more: object) -> tuple[torch.Tensor, loop.Outcome]:
    model = adapted(base, message or recipe_message())  # type: ignore[arg-type]  # a recipe message
    outcome = loop.train(model, examples(model, rows).items, plan, quiet, **more)  # type: ignore[arg-type]  # options of the test
    return _values(model), outcome


def test_accumulated_micro_batches_are_the_big_batch(bert: Path, rows_file: Path) -> None:
    whole, _ = _trained(bert, rows_file, PLAN)
    parts, outcome = _trained(bert, rows_file, replace(PLAN, micro_rows=3))
    assert torch.allclose(whole, parts, atol=1e-5)
    assert outcome.micro_rows == 3


def test_accumulation_weighs_target_tokens_not_micro_batches(llama: Path, causal_rows: Path) -> None:
    message = recipe_message("causal-lm", ("q_proj", "v_proj"), mask_prompt=False, max_length=9)
    whole, _ = _trained(llama, causal_rows, PLAN, message)
    parts, _ = _trained(llama, causal_rows, replace(PLAN, micro_rows=2), message)
    assert torch.allclose(whole, parts, atol=1e-4)


def test_gradient_checkpointing_changes_no_result(llama: Path, causal_rows: Path) -> None:
    plain, _ = _trained(llama, causal_rows, PLAN, recipe_message("causal-lm", ("q_proj",)))
    less, _ = _trained(llama, causal_rows, PLAN, recipe_message("causal-lm", ("q_proj",), gradient_checkpointing=True))
    assert torch.allclose(plain, less, atol=1e-5)


def test_the_same_seed_gives_the_same_adapter(bert: Path, rows_file: Path) -> None:
    first, _ = _trained(bert, rows_file, PLAN)
    second, _ = _trained(bert, rows_file, PLAN)
    other, _ = _trained(bert, rows_file, replace(PLAN, seed="1/2"))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_proximal_term_pulls_towards_the_global_state(bert: Path, rows_file: Path) -> None:
    model = adapted(bert, recipe_message())
    anchors = [parameter.detach().clone() for parameter in model.parameters]
    start = _values(model)
    free, _ = _trained(bert, rows_file, replace(PLAN, total_rows=80))
    pulled, _ = _trained(bert, rows_file, replace(PLAN, total_rows=80, proximal_mu=10.0), anchors=anchors)
    assert float((pulled - start).norm()) < 0.5 * float((free - start).norm())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")])
def test_a_batch_that_does_not_fit_is_halved_and_its_step_done_again(bert: Path, rows_file: Path, error: Exception) -> None:
    def scarce(model: AdaptedModel, batch: Batch, share: float, scaler: torch.amp.GradScaler) -> torch.Tensor:
        if len(batch["labels"]) > 2:
            loop.backward(model, batch, share, scaler)  # half of a failed pass leaves gradients behind
            raise error
        return loop.backward(model, batch, share, scaler)

    whole, _ = _trained(bert, rows_file, PLAN)
    parts, outcome = _trained(bert, rows_file, PLAN, micro_step=scarce)
    assert (outcome.micro_rows, outcome.samples) == (2, 24)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_one_row_that_does_not_fit_is_out_of_memory(bert: Path, rows_file: Path) -> None:
    def none(model: AdaptedModel, batch: Batch, share: float, scaler: torch.amp.GradScaler) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError, match=r"One row of \d+ tokens"):
        _trained(bert, rows_file, PLAN, micro_step=none)


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(bert: Path, rows_file: Path) -> None:
    def broken(model: AdaptedModel, batch: Batch, share: float, scaler: torch.amp.GradScaler) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        _trained(bert, rows_file, PLAN, micro_step=broken)


def test_a_memory_bound_makes_the_forward_batch_smaller_beforehand(bert: Path, rows_file: Path) -> None:
    costs: dict[int, int] = {}
    _, outcome = _trained(bert, rows_file, replace(PLAN, memory_bytes=1), row_costs=costs)
    assert outcome.micro_rows == 1
    assert all(cost > 10_000 for cost in costs.values())
    _, roomy = _trained(bert, rows_file, replace(PLAN, memory_bytes=1 << 40), row_costs=costs)
    assert roomy.micro_rows == 8


def test_a_loss_that_explodes_is_named_with_its_step(bert: Path, rows_file: Path) -> None:
    def nan(model: AdaptedModel, batch: Batch, share: float, scaler: torch.amp.GradScaler) -> torch.Tensor:
        return loop.backward(model, batch, share, scaler) * float("nan")

    with pytest.raises(NotFiniteError, match="step 1 of 3"):
        _trained(bert, rows_file, PLAN, micro_step=nan)


def test_the_last_step_of_an_epoch_takes_what_is_left(bert: Path, rows_file: Path) -> None:
    sizes: list[int] = []

    def watched(model: AdaptedModel, batch: Batch, share: float, scaler: torch.amp.GradScaler) -> torch.Tensor:
        sizes.append(len(batch["labels"]))
        return loop.backward(model, batch, share, scaler)

    _, outcome = _trained(bert, rows_file, replace(PLAN, total_rows=20), micro_step=watched)
    assert sizes == [8, 8, 4]
    assert (outcome.steps, outcome.samples) == (3, 20)


def test_progress_ends_with_the_last_step_and_its_loss(bert: Path, rows_file: Path) -> None:
    heard: list[tuple[str, dict[str, object]]] = []
    model = adapted(bert, recipe_message())
    outcome = loop.train(model, examples(model, rows_file).items, PLAN, lambda event, **fields: heard.append((event, fields)))
    last = [fields for event, fields in heard if event == "progress"][-1]
    assert last == {"stage": "training", "done": 3, "total": 3, "loss": outcome.last_loss}
    assert any(event == "log" for event, _ in heard)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_of_any_type_learns_with_float32_adapters(bert: Path, rows_file: Path, dtype: str) -> None:
    model = adapted(bert, recipe_message(dtype=dtype))
    frozen = {parameter.dtype for name, parameter in model.model.named_parameters() if not parameter.requires_grad and "encoder" in name}
    outcome = loop.train(model, examples(model, rows_file).items, replace(PLAN, total_rows=200), quiet)
    assert frozen == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in model.parameters} == {torch.float32}
    assert outcome.last_loss < 0.5


def test_gradients_longer_than_the_bound_are_cut(bert: Path, rows_file: Path) -> None:
    free, _ = _trained(bert, rows_file, PLAN)
    cut, _ = _trained(bert, rows_file, replace(PLAN, max_grad_norm=1e-9))
    assert not torch.allclose(free, cut, atol=1e-4)


class _Listening:
    """A watcher that says what it was told to say before each step."""

    def __init__(self, words: Sequence[loop.Word]) -> None:
        self.words = words
        self.asked: list[int] = []
        self.norms: list[float] = []
        self.parameters: list[torch.nn.Parameter] = []

    def before(self, step: int, optimiser: torch.optim.Optimizer) -> loop.Word:
        self.asked.append(step)
        self.parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        return self.words[step]

    def observe(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))


def test_a_watcher_changes_nothing_by_looking_on(bert: Path, rows_file: Path) -> None:
    alone, _ = _trained(bert, rows_file, PLAN)
    watcher = _Listening(["go", "changed", "go"])
    watched, outcome = _trained(bert, rows_file, PLAN, watcher=watcher)
    assert torch.equal(alone, watched)
    assert (outcome.steps, watcher.asked, len(watcher.norms)) == (3, [0, 1, 2], 3)


def test_a_watcher_sees_gradients_before_they_are_clipped(bert: Path, rows_file: Path) -> None:
    plain, clipped = _Listening(["go", "go", "go"]), _Listening(["go", "go", "go"])
    _trained(bert, rows_file, PLAN, watcher=plain)
    _trained(bert, rows_file, replace(PLAN, max_grad_norm=1e-9), watcher=clipped)
    assert clipped.norms[0] == pytest.approx(plain.norms[0], rel=1e-6)


def test_a_watcher_ends_the_round_after_the_first_step(bert: Path, rows_file: Path) -> None:
    watcher = _Listening(["stop", "stop", "go"])
    _, outcome = _trained(bert, rows_file, PLAN, watcher=watcher)
    assert (outcome.steps, outcome.samples, watcher.asked) == (1, 8, [0, 1])
    assert outcome.mean_loss == outcome.last_loss > 0
