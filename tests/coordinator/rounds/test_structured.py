"""What a pruned device has of the global state, and that its part finds the way back."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fleetune import architectures, importances, sparsity, structures
from fleetune.coordinator.lora.factors import Factors, Matrix, Part
from fleetune.coordinator.lora.means import ProductMean
from fleetune.coordinator.rounds import structured
from fleetune.errors import WireError
from fleetune.structures import Structure
from fleetune.wire import codec

LAYOUT = architectures.layout(
    {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 40,
    }
)  # fmt: skip
STEM = "base_model.model.model.layers.0"
SHAPES = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (40, 32), "mlp.down_proj": (32, 40),
}  # fmt: skip


def kept(share: float, seed: int) -> Structure:
    draw = random.Random(seed)
    scores = [[draw.random() for _ in range(group.units)] for group in LAYOUT.groups]
    return structures.choose(LAYOUT, structures.whole(LAYOUT), sparsity.keeps(LAYOUT, share), scores)


def names(module: str) -> tuple[str, str]:
    return f"{STEM}.{module}.lora_B.weight", f"{STEM}.{module}.lora_A.weight"


def pair(module: str, seed: int, rank: int = 3) -> tuple[Matrix, Matrix]:
    rng = np.random.default_rng(seed)
    rows, columns = SHAPES[module]
    return rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))


@pytest.mark.parametrize("module", SHAPES)
def test_the_mean_over_devices_of_unlike_structures_is_the_dense_one(module: str) -> None:
    rows, columns = SHAPES[module]
    left_name, right_name = names(module)
    old = Factors(*pair(module, 9), 2.0)
    mean = ProductMean(rows, columns)
    total, weights = np.zeros((rows, columns)), np.zeros((rows, columns))
    for seed, share, weight, scale in ((1, 0.5, 3.0, 2.0), (2, 0.5, 1.0, 0.5), (3, 0.75, 2.0, 1.0)):
        structure = kept(share, seed)
        left, right = (
            structured.sliced(LAYOUT, structure, name, value) for name, value in zip(names(module), pair(module, seed), strict=True)
        )
        some_rows, some_columns = structured.pair_kept(LAYOUT, structure, left_name, right_name)
        mean.add(Part(str(seed), weight, Factors(left, right, scale), some_rows, some_columns))
        place = np.ix_(np.arange(rows) if some_rows is None else some_rows, np.arange(columns) if some_columns is None else some_columns)
        total[place] += weight * scale * left @ right
        weights[place] += weight
    expected = np.where(weights > 0, total / np.maximum(weights, 1e-30), old.dense())
    np.testing.assert_allclose(mean.result(old).dense(), expected, atol=1e-12)


@pytest.mark.parametrize("module", SHAPES)
def test_slicing_and_putting_back_again_changes_nothing(module: str) -> None:
    structure = kept(0.5, 4)
    for name, value in zip(names(module), pair(module, 5), strict=True):
        part = structured.sliced(LAYOUT, structure, name, value)
        assert part.shape == structured.shape(LAYOUT, structure, name, value.shape)
        found = structured.kept(LAYOUT, structure, name)
        if found is None:
            assert part is value
            continue
        again = value.copy()
        again[(slice(None),) * found[0] + (found[1],)] = part
        assert np.array_equal(again, value)
        assert np.array_equal(structured.sliced(LAYOUT, structure, name, again), part)


def test_a_pair_shrinks_on_one_side_alone() -> None:
    structure = kept(0.5, 4)
    for module in SHAPES:
        rows, columns = structured.pair_kept(LAYOUT, structure, *names(module))
        assert (rows is None) != (columns is None)


def test_heads_that_are_trained_whole_are_nobody_s_to_cut() -> None:
    assert structured.kept(LAYOUT, kept(0.5, 1), "base_model.model.score.weight") is None


def test_importance_in_an_update_is_of_its_layout_or_refused() -> None:
    def told(word: str) -> codec.TensorTable:
        return codec.TensorTable((), {structured.IMPORTANCE_KEY: word} if word else {}, 0, 0)

    word = importances.to_text([[1.0] * group.units for group in LAYOUT.groups])
    assert structured.importance_of(told(word), LAYOUT) == word
    assert structured.importance_of(told(""), LAYOUT) == ""
    with pytest.raises(WireError, match="importance of units is refused"):
        structured.importance_of(told(word[:-8]), LAYOUT)
