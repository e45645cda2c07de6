"""Importance of heads and neurons from LoRA's gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fleetune import architectures, sparsity, structures
from fleetune.errors import ModelError
from fleetune.model import importance
from fleetune.model.importance import Importance
from fleetune.model.pruning import Pruned
from support import prunable


def backward(model: prunable.Model, scale: float = 1.0, seed: int = 3) -> None:
    model.zero_grad()
    (model(**prunable.inputs(model, seed=seed)).logits.square().mean() * scale).backward()


def scored(name: str, rank: int = 4) -> tuple[Pruned, Importance]:
    model = prunable.adapted(prunable.made(name), rank=rank)
    pruned = Pruned(model, prunable.layout_of(model))
    return pruned, Importance(pruned)


def test_with_a_full_rank_identity_the_surrogate_is_the_gradient_of_the_weight() -> None:
    base = prunable.made("bert")
    model = prunable.adapted(base, rank=48)
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    output = model.base_model.model.bert.encoder.layer[0].attention.output.dense
    scale = query.scaling["default"]
    with torch.no_grad():
        for layer in (query, output):
            layer.lora_A["default"].weight.copy_(torch.eye(48))
            layer.lora_B["default"].weight.zero_()
            layer.base_layer.weight.requires_grad_(True)
    backward(model)
    layout = prunable.layout_of(base)
    for layer, path in ((query, "attention.self.query"), (output, "attention.output.dense")):
        _, piece = layout.modules[f"encoder.layer.0.{path}"]
        weight = layer.base_layer.weight
        expected = (scale * weight.grad * weight).abs().sum(dim=1 - piece.axis).reshape(-1, piece.width).sum(dim=1)
        expected = expected / expected.norm()
        found = importance._sensitivity(layer, piece, cross_term=False, loss_scale=1.0)
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)


def test_the_average_follows_its_recursion() -> None:
    pruned, measured = scored("bert")
    seen = []
    for seed in (1, 2, 3):
        backward(pruned.model, seed=seed)
        measured.observe()
        fresh = Importance(pruned, decay=0.0)
        fresh.observe()
        seen.append(torch.tensor(fresh.scores()[0]))
    expected = torch.zeros(6)
    for values in seen:
        expected = 0.9 * expected + 0.1 * values
    torch.testing.assert_close(torch.tensor(measured.scores()[0]), expected)
    assert measured.steps == 3


def test_the_ranking_does_not_depend_on_a_scale_of_the_loss() -> None:
    pruned, plain = scored("bert")
    scaled = Importance(pruned)
    backward(pruned.model)
    plain.observe()
    backward(pruned.model, scale=1024.0)
    scaled.observe()
    for one, other in zip(plain.scores(), scaled.scores(), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-9)


def test_with_the_cross_term_gradients_have_to_be_unscaled() -> None:
    model = prunable.adapted(prunable.made("bert"))
    pruned = Pruned(model, prunable.layout_of(model))
    plain, unscaled, raw = (Importance(pruned, cross_term=True) for _ in range(3))
    backward(model)
    plain.observe()
    backward(model, scale=65536.0)
    unscaled.observe(loss_scale=65536.0)
    raw.observe()
    assert plain.scores()[1] == pytest.approx(unscaled.scores()[1], rel=1e-3)
    assert plain.scores()[1] != pytest.approx(raw.scores()[1], rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_left_out(value: float) -> None:
    pruned, measured = scored("bert")
    backward(pruned.model)
    measured.observe()
    before = measured.scores()
    backward(pruned.model, seed=4)
    model: prunable.Model = pruned.model
    next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).grad[0, 0] = value
    assert not measured.observe()
    assert (measured.scores(), measured.steps, measured.skipped) == (before, 1, 1)


def test_scores_of_grouped_queries_add_up_over_their_key_value_head() -> None:
    pruned, measured = scored("llama")
    backward(pruned.model)
    measured.observe()
    heads = torch.tensor(measured.scores()[0]).reshape(4, 2)
    layers = {piece.path.rpartition(".")[2]: (layer, piece) for layer, piece in measured._layers[0]}
    parts = {name: importance._sensitivity(*entry, cross_term=False, loss_scale=1.0) for name, entry in layers.items()}
    expected = sum(parts[name].reshape(4, -1).sum(dim=1) for name in parts)
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(heads.sum(dim=1) / 0.1, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "qwen2", "t5"])
def test_scores_follow_the_structure(name: str) -> None:
    pruned, measured = scored(name)
    backward(pruned.model)
    measured.observe()
    before = measured.scores()
    pruned.cut_to(structures.choose(pruned.layout, pruned.structure, sparsity.keeps(pruned.layout, 0.5), before))
    for index, (old, new) in enumerate(zip(before, measured.scores(), strict=True)):
        kept = set(structures.units(pruned.structure.kept[index]))
        assert new == [value if unit in kept else 0.0 for unit, value in enumerate(old)]
    backward(pruned.model)
    assert measured.observe()


def test_scores_of_a_device_that_goes_on_are_taken_up_again() -> None:
    pruned, measured = scored("bert")
    for seed in (1, 2):
        backward(pruned.model, seed=seed)
        measured.observe()
    again = Importance(pruned)
    again.restore(measured.scores(), measured.steps)
    backward(pruned.model, seed=3)
    measured.observe()
    again.observe()
    assert again.scores() == measured.scores()


def test_what_matters_is_found_and_what_does_not_is_not() -> None:
    """Neurons whose output is hardly read, and heads whose values are hardly written, come last."""
    base = prunable.made("bert")
    layer = base.bert.encoder.layer[1]
    with torch.no_grad():
        layer.output.dense.weight[:, ::2] *= 1e-3
        layer.intermediate.dense.weight[::2] *= 1e-3
        layer.attention.self.value.weight[8:16] *= 1e-3
        layer.attention.self.query.weight[8:16] *= 1e-3
        layer.attention.self.key.weight[8:16] *= 1e-3
        layer.attention.output.dense.weight[:, 8:16] *= 1e-3
    model = prunable.adapted(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    pruned = Pruned(model, prunable.layout_of(base))
    measured = Importance(pruned)
    for seed in range(4):
        backward(model, seed=seed)
        measured.observe()
    half = structures.choose(pruned.layout, pruned.structure, sparsity.keeps(pruned.layout, 0.5), measured.scores())
    assert structures.units(half.kept[3]) == list(range(1, 64, 2))
    assert 1 not in structures.units(half.kept[2])


def test_long_weights_are_taken_in_slabs_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, whole = scored("bert")
    slabs = Importance(pruned)
    backward(pruned.model)
    whole.observe()
    monkeypatch.setattr(importance, "SLAB_ELEMENTS", 100)
    slabs.observe()
    for one, other in zip(whole.scores(), slabs.scores(), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_group_without_a_lora_pair_is_refused() -> None:
    base = prunable.made("bert")
    model = prunable.adapted(base, targets=("query", "value"))
    with pytest.raises(ModelError, match=r"layer\.0\.neurons"):
        Importance(Pruned(model, prunable.layout_of(base)))


def test_one_layer_of_a_group_is_enough() -> None:
    base = prunable.made("bert")
    layout = prunable.layout_of(base)
    model = prunable.adapted(base, targets=("value", "intermediate.dense"))
    architectures.check_targets(layout, ("value", "intermediate.dense"))
    measured = Importance(Pruned(model, layout))
    backward(model)
    assert measured.observe()


def test_a_pair_of_which_one_matrix_is_frozen_still_tells() -> None:
    pruned, measured = scored("bert")
    for name, parameter in pruned.model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    backward(pruned.model)
    assert measured.observe()
    assert all(max(values) > 0 for values in measured.scores())


def test_without_a_backward_pass_there_is_nothing_to_observe() -> None:
    _, measured = scored("bert")
    with pytest.raises(ModelError, match="no gradient"):
        measured.observe()
