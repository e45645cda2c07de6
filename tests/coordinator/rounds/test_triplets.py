"""States of triplets on disk: what is cut of them, and the plain LoRA that they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fleetune.coordinator.history import triplets as recomputed
from fleetune.coordinator.rounds import triplets
from fleetune.errors import WireError
from fleetune.wire import codec

P = "base_model.model."
Q, V = "bert.layer.0.query", "bert.layer.0.value"
ALIVE = {Q: "1010", V: "00"}


def state(path: Path, seed: int = 0, scale: float = 1.0, **metadata: str) -> Path:
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {f"{P}classifier.bias": (3,)}
    for name, rank in ((Q, 4), (V, 2)):
        shapes |= {f"{P}{name}.lora_A": (rank, 5), f"{P}{name}.lora_B": (6, rank), f"{P}{name}.lora_E": (rank,)}
    tensors = {name: (scale * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt", **{key.replace("_", "."): value for key, value in metadata.items()}})
    return path


def test_a_cut_state_has_the_triplets_that_live_and_nothing_of_the_others(tmp_path: Path) -> None:
    source = state(tmp_path / "state")
    before = load_file(source)
    written = triplets.sliced(source, tmp_path / "out", ALIVE)
    after = load_file(tmp_path / "out")
    assert set(after) == {f"{P}classifier.bias", *(f"{P}{Q}.lora_{part}" for part in "ABE")}
    np.testing.assert_array_equal(after[f"{P}{Q}.lora_A"], before[f"{P}{Q}.lora_A"][[0, 2]])
    np.testing.assert_array_equal(after[f"{P}{Q}.lora_B"], before[f"{P}{Q}.lora_B"][:, [0, 2]])
    np.testing.assert_array_equal(after[f"{P}{Q}.lora_E"], before[f"{P}{Q}.lora_E"][[0, 2]])
    np.testing.assert_array_equal(after[f"{P}classifier.bias"], before[f"{P}classifier.bias"])
    table = codec.read_table(tmp_path / "out")
    assert triplets.ranks_of(table) == {Q: 2}
    assert written.size_bytes == (tmp_path / "out").stat().st_size < source.stat().st_size
    assert written.trainables_digest == codec.trainables_digest(table) != codec.trainables_digest(codec.read_table(source))


def test_a_state_may_be_cut_in_its_own_place_and_the_bytes_are_the_same_again(tmp_path: Path) -> None:
    first = triplets.sliced(state(tmp_path / "one"), tmp_path / "one", ALIVE)
    second = triplets.sliced(state(tmp_path / "two"), tmp_path / "other", ALIVE)
    assert first == second


@pytest.mark.parametrize("alive", [{Q: "1010"}, {Q: "101", V: "00"}, {Q: "1010", V: "00", "x": "1"}])
def test_a_decision_of_other_triplets_is_refused(tmp_path: Path, alive: dict[str, str]) -> None:
    with pytest.raises(WireError, match="other triplets"):
        triplets.sliced(state(tmp_path / "state"), tmp_path / "out", alive)


def test_the_plain_lora_is_the_same_product(tmp_path: Path) -> None:
    source = state(tmp_path / "state")
    triplets.as_lora(source, tmp_path / "lora")
    own, found = load_file(source), load_file(tmp_path / "lora")
    assert set(found) == {f"{P}classifier.bias", *(f"{P}{name}.lora_{part}.weight" for name in (Q, V) for part in "AB")}
    for name in (Q, V):
        a, b, e = (own[f"{P}{name}.lora_{part}"] for part in "ABE")
        np.testing.assert_allclose(found[f"{P}{name}.lora_B.weight"] @ found[f"{P}{name}.lora_A.weight"], b @ np.diag(e) @ a, rtol=1e-4)


def test_the_configuration_follows_the_ranks_and_the_scale_stays() -> None:
    text = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]})
    found = json.loads(triplets.config(text, {Q: 2}, scale=2.0))
    assert found["target_modules"] == [Q]
    assert (found["rank_pattern"], found["alpha_pattern"]) == ({Q: 2}, {Q: 4.0})


def test_the_check_comes_to_the_same_and_sees_what_is_not(tmp_path: Path) -> None:
    start = state(tmp_path / "start")
    updates = [state(tmp_path / f"update-{seed}", seed, 0.1, fleetune_update="delta") for seed in (1, 2)]
    mean = {name: value.astype(np.float64) for name, value in load_file(start).items()}
    for path, weight in zip(updates, (3, 1), strict=True):
        for name, value in load_file(path).items():
            mean[name] += weight / 4 * value.astype(np.float64)
    save_file({name: value.astype(np.float32) for name, value in mean.items()}, tmp_path / "folded", metadata={"format": "pt"})
    end = tmp_path / "end"
    triplets.sliced(tmp_path / "folded", end, ALIVE)
    assert recomputed.unlike(start, end, updates, (3, 1), ALIVE) == []
    other = {**ALIVE, Q: "0110"}
    assert recomputed.unlike(start, end, updates, (3, 1), other) == [f"{P}{Q}.lora_{part}" for part in "ABE"]
    assert f"{P}{V}.lora_A" in recomputed.unlike(start, end, updates, (3, 1), {**ALIVE, V: "01"})
    assert recomputed.unlike(start, end, updates, (1, 3), ALIVE)
