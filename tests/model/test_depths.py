"""Blocks of depth from the loss, and what training down to one of them keeps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fleetune.model import depths
from fleetune.model.batches import Batch
from fleetune.model.lora import AdaptedModel
from support.adapted import adapted
from support.jobs import recipe_message
from support.tiny_models import tiny_classifier

LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return adapted(tiny_classifier(tmp_path_factory.mktemp("base"), LAYERS), recipe_message())


def batch() -> Batch:
    return {
        "input_ids": torch.ones(4, 16, dtype=torch.long),
        "attention_mask": torch.ones(4, 16, dtype=torch.long),
        "labels": torch.zeros(4, dtype=torch.long),
    }


def test_depth_counts_from_the_loss(model: AdaptedModel) -> None:
    blocks = depths.depth_blocks(model)
    assert [block.name for block in blocks] == ["head", "layer.3", "layer.2", "layer.1", "layer.0"]


def test_every_trainable_tensor_is_in_one_block(model: AdaptedModel) -> None:
    names = [name for block in depths.depth_blocks(model) for name in block.tensor_names]
    assert sorted(names) == [trainable.name for trainable in model.trainables]
    assert sum(block.parameter_count for block in depths.depth_blocks(model)) == model.trainable_count


def test_a_model_without_a_head_to_train_begins_with_its_last_layer(llama: Path) -> None:
    blocks = depths.depth_blocks(adapted(llama, recipe_message("causal-lm", ("q_proj",))))
    assert [block.name for block in blocks] == ["layer.1", "layer.0"]


def test_saved_activations_grow_with_depth(model: AdaptedModel) -> None:
    blocks = depths.depth_blocks(model)
    saved: list[int] = []
    for depth in range(1, len(blocks) + 1):
        with depths.training_only(model, blocks[:depth]):
            saved.append(depths.saved_bytes(model, batch()))
    assert saved == sorted(set(saved))
    # Layers are alike, so each adds the same.
    assert len({late - early for early, late in itertools.pairwise(saved[1:])}) == 1


def test_one_block_alone_keeps_what_lies_above_it_as_well(model: AdaptedModel) -> None:
    blocks = depths.depth_blocks(model)
    with depths.training_only(model, blocks[2:3]):
        alone = depths.saved_bytes(model, batch())
    with depths.training_only(model, blocks[:1]):
        head = depths.saved_bytes(model, batch())
    assert alone > head


def test_below_the_deepest_block_nothing_gets_a_gradient(model: AdaptedModel) -> None:
    blocks = depths.depth_blocks(model)
    with depths.training_only(model, blocks[:2]):
        model.model(**batch()).loss.backward()
    having = [all(parameter.grad is not None for parameter in block.parameters) for block in blocks]
    model.model.zero_grad(set_to_none=True)
    assert having == [True, True, False, False, False]


def test_afterwards_all_is_trained_as_before_also_after_an_error(model: AdaptedModel) -> None:
    def failing() -> None:
        with depths.training_only(model, ()):
            assert not any(parameter.requires_grad for parameter in model.parameters)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert all(parameter.requires_grad for parameter in model.parameters)
