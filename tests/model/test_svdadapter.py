"""Triplet adapters: neutral at first, dropped for good, gone with the last triplet."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from fleetune.errors import ModelError
from fleetune.model import svdadapter
from fleetune.model.svdadapter import SvdLinear, TripletScores
from support import prunable

TARGETS = ("query", "value")


def attached(rank: int = 4, trained: bool = True) -> tuple[prunable.Model, dict[str, SvdLinear]]:
    model = prunable.made("bert")
    adapters = svdadapter.attach(model, TARGETS, rank, alpha=8.0, seed=1)
    if trained:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in svdadapter.tensors(adapters).values():
                parameter.normal_(0.0, 0.3)
    return model, adapters


def masks(adapters: dict[str, SvdLinear], kept: tuple[int, ...]) -> dict[str, list[bool]]:
    return {name: [place in kept for place in range(adapter.rank)] for name, adapter in adapters.items()}


def loss(model: prunable.Model) -> Any:
    return model(**prunable.inputs(model)).logits.square().mean()


def test_a_fresh_adapter_changes_nothing_and_learns_from_the_first_step() -> None:
    plain = prunable.made("bert")
    model, adapters = attached(trained=False)
    batch = prunable.inputs(plain)
    assert torch.equal(prunable.logits(model, batch), prunable.logits(plain, batch))
    loss(model).backward()
    first = next(iter(adapters.values()))
    assert first.values.grad is not None and first.values.grad.abs().max() > 0
    assert first.left.grad is not None and first.left.grad.abs().max() == 0


def test_the_same_seed_gives_the_same_factors() -> None:
    one, other = (svdadapter.tensors(attached(trained=False)[1]) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_triplets_are_trained_and_their_names_are_sorted() -> None:
    model, adapters = attached()
    named = svdadapter.tensors(adapters)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in named.values()}
    modules = [name.rpartition(".")[0] for name in named]
    assert modules == sorted(modules)
    assert list(named)[:3] == [f"bert.encoder.layer.0.attention.self.query.lora_{part}" for part in "ABE"]


def test_dropping_triplets_of_value_zero_changes_no_output() -> None:
    model, adapters = attached()
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.values[[1, 3]] = 0.0
    batch = prunable.inputs(model)
    before = prunable.logits(model, batch)
    svdadapter.keep(model, adapters, masks(adapters, (0, 2)))
    assert all(adapter.rank == 2 for adapter in adapters.values())
    torch.testing.assert_close(prunable.logits(model, batch), before, atol=1e-6, rtol=1e-6)


def test_the_scale_of_what_is_left_does_not_change() -> None:
    model, adapters = attached()
    scales = {name: adapter.scale for name, adapter in adapters.items()}
    svdadapter.keep(model, adapters, masks(adapters, (0,)))
    assert {name: adapter.scale for name, adapter in adapters.items()} == scales == dict.fromkeys(scales, 2.0)


def test_a_module_without_triplets_leaves_the_model() -> None:
    model, adapters = attached()
    gone_name = "bert.encoder.layer.0.attention.self.query"
    alive = masks(adapters, (0, 1)) | {gone_name: [False] * 4}
    assert svdadapter.keep(model, adapters, alive) == [gone_name]
    assert gone_name not in adapters
    assert type(model.get_submodule(gone_name)) is torch.nn.Linear
    assert not any(name.startswith(gone_name) and parameter.requires_grad for name, parameter in model.named_parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.get_submodule(gone_name)(torch.zeros(1, 2, 48))
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::linear") == 1


def test_below_the_lowest_adapter_no_gradient_is_computed() -> None:
    model, adapters = attached()
    alive = {name: [".layer.2." in name] * 4 for name in adapters}
    svdadapter.keep(model, adapters, alive)
    wanted = []
    layers = model.bert.encoder.layer
    handles = [layer.register_forward_hook(lambda *seen: wanted.append(_needs_gradient(seen[2]))) for layer in layers]
    model(**prunable.inputs(model))
    for handle in handles:
        handle.remove()
    assert wanted == [False, False, True]


def _needs_gradient(output: torch.Tensor | tuple[torch.Tensor, ...]) -> bool:
    return (output if isinstance(output, torch.Tensor) else output[0]).requires_grad


def test_dropped_triplets_get_no_gradient_and_the_others_go_on_with_their_moments() -> None:
    model, adapters = attached()
    trained = list(svdadapter.tensors(adapters).values())
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    loss(model).backward()
    optimiser.step()
    name = "bert.encoder.layer.1.attention.self.value"
    left, moments = adapters[name].left.detach().clone(), optimiser.state[adapters[name].left]["exp_avg"].clone()
    alive = masks(adapters, (1, 2)) | {"bert.encoder.layer.0.attention.self.query": [False] * 4}
    svdadapter.keep(model, adapters, alive, optimiser)
    assert torch.equal(adapters[name].left, left[:, [1, 2]])
    assert torch.equal(optimiser.state[adapters[name].left]["exp_avg"], moments[:, [1, 2]])
    held = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(p) for p in svdadapter.tensors(adapters).values()} == {*map(id, optimiser.state)}
    before = [parameter.detach().clone() for parameter in held]
    optimiser.zero_grad()
    loss(model).backward()
    optimiser.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, held, strict=True))
    assert adapters[name].rank == 2


def test_masks_of_another_round_are_refused_and_nothing_is_dropped() -> None:
    model, adapters = attached()
    alive = masks(adapters, (0,))
    alive["bert.encoder.layer.2.attention.self.value"] = [True] * 3
    with pytest.raises(ModelError, match="has 3 places, its adapter 4 triplets"):
        svdadapter.keep(model, adapters, alive)
    assert all(adapter.rank == 4 for adapter in adapters.values())


def test_scores_are_sensitivity_times_uncertainty() -> None:
    model, adapters = attached()
    scores = TripletScores(adapters)
    loss(model).backward()
    scores.observe()
    name, adapter = next(iter(adapters.items()))

    def once(parameter: torch.nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        sensitivity = (parameter * parameter.grad).abs().detach()
        return 0.15 * sensitivity * 0.15 * (0.85 * sensitivity)

    expected = once(adapter.values) + once(adapter.right).mean(dim=1) + once(adapter.left).mean(dim=0)
    assert scores.scores()[name] == pytest.approx(expected.tolist(), rel=1e-4)


def test_scores_follow_what_was_dropped_and_leave_out_what_is_not_finite() -> None:
    model, adapters = attached()
    scores = TripletScores(adapters)
    loss(model).backward()
    scores.observe()
    before = scores.scores()
    gone = "bert.encoder.layer.0.attention.self.query"
    alive = masks(adapters, (0, 3)) | {gone: [False] * 4}
    svdadapter.keep(model, adapters, alive)
    scores.follow(alive)
    assert scores.scores().keys() == before.keys() - {gone}
    for name, values in scores.scores().items():
        assert values == pytest.approx([before[name][0], before[name][3]], rel=1e-5)
    loss(model).backward()
    next(iter(adapters.values())).values.grad[0] = math.nan  # type: ignore[index]
    assert not scores.observe()
    assert (scores.steps, scores.skipped) == (1, 1)


def test_merging_gives_the_same_output() -> None:
    model, adapters = attached()
    batch = prunable.inputs(model)
    before = prunable.logits(model, batch)
    svdadapter.merge(model, adapters)
    assert not adapters and not any(isinstance(module, SvdLinear) for module in model.modules())
    torch.testing.assert_close(prunable.logits(model, batch), before, atol=1e-5, rtol=1e-5)


def test_peft_loads_it_as_a_plain_lora_of_unequal_ranks(tmp_path: Path) -> None:
    model, adapters = attached()
    alive = {name: [place <= index % 4 for place in range(4)] for index, name in enumerate(adapters)}
    alive["bert.encoder.layer.2.attention.self.value"] = [False] * 4
    svdadapter.keep(model, adapters, alive)
    batch = prunable.inputs(model)
    state, settings = svdadapter.as_lora(adapters)
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"task_type": None, "inference_mode": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(prunable.made("bert"), tmp_path).eval()
    torch.testing.assert_close(prunable.logits(loaded, batch), prunable.logits(model, batch), atol=1e-5, rtol=1e-5)


def test_the_penalty_is_zero_for_orthonormal_factors_alone() -> None:
    _, adapters = attached()
    assert svdadapter.orthogonality(adapters) > 0.1
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.right.copy_(torch.eye(*adapter.right.shape))
            adapter.left.copy_(torch.eye(*adapter.left.shape))
    assert svdadapter.orthogonality(adapters) == 0


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'wq'.*query"):
        svdadapter.attach(prunable.made("bert"), ("query", "wq"), 4, 8.0)
