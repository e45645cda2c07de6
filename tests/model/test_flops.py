"""Counted operations against those that torch itself dispatches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fleetune.model import depths, flops
from support.adapted import adapted
from support.jobs import recipe_message
from support.tiny_models import tiny_classifier

ROWS, TOKENS, WIDTH, LAYERS = 4, 32, 32, 3


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_count_is_near_torch_s_own(tmp_path_factory: pytest.TempPathFactory, depth: int) -> None:
    model = adapted(tiny_classifier(tmp_path_factory.mktemp("base"), LAYERS), recipe_message())
    batch = {
        "input_ids": torch.ones(ROWS, TOKENS, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
        "labels": torch.zeros(ROWS, dtype=torch.long),
    }
    # As products of matrices, which is what torch's counter knows on a CPU.
    with depths.training_only(model, depths.depth_blocks(model)[:depth]), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as reference:
            model.model(**batch).loss.backward()
        model.model.zero_grad(set_to_none=True)
        with flops.counting(model.model) as counted:
            model.model(**batch)
    own = counted.step + flops.attention(ROWS, TOKENS, WIDTH, LAYERS, depth - 1).step
    assert own == pytest.approx(reference.get_total_flops(), rel=0.1)


def test_attention_takes_twice_as_much_backwards() -> None:
    counted = flops.attention(2, 8, 16, 3, 1)
    assert (counted.forward, counted.backward) == (3 * 4 * 2 * 64 * 16, 2 * 4 * 2 * 64 * 16)
