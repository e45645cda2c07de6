"""Which models can be pruned is known before a job's first round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleetune import architectures, sparsity, structures
from fleetune.coordinator.domain import Pruning
from fleetune.coordinator.rounds import layouts
from fleetune.errors import ModelError, WireError

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
LAYOUT = architectures.layout(BERT)
WHOLE = structures.whole(LAYOUT)
ALL = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def base(folder: Path, text: str) -> Path:
    path = folder / layouts.CONFIG_NAME
    path.write_text(text)
    return path


def test_a_known_model_has_a_group_of_heads_and_one_of_neurons_in_each_layer(tmp_path: Path) -> None:
    layout = layouts.of_config(base(tmp_path, json.dumps(BERT)), ALL)
    assert [(group.kind, group.units) for group in layout.groups] == [("heads", 4), ("neurons", 64)] * 2


@pytest.mark.parametrize(
    ("text", "targets", "wrong"),
    [
        (json.dumps({**BERT, "model_type": "mamba"}), ALL, "'mamba'.*cannot be pruned"),
        (json.dumps(BERT), ("query", "value"), "importance of neurons"),
        ("[]", ALL, "no JSON object"),
        ("{", ALL, "cannot be read"),
    ],
)
def test_what_cannot_be_pruned_is_told_before_the_first_round(tmp_path: Path, text: str, targets: tuple[str, ...], wrong: str) -> None:
    with pytest.raises(ModelError, match=wrong):
        layouts.of_config(base(tmp_path, text), targets)


def told(structure: str, before: float, after: float) -> Pruning:
    return Pruning("a", structure, before, after, 1.0, 8)


def cut(share: float, start: structures.Structure = WHOLE) -> structures.Structure:
    return structures.choose(LAYOUT, start, sparsity.keeps(LAYOUT, share), [[0.0] * group.units for group in LAYOUT.groups])


def hexed(structure: structures.Structure) -> str:
    return structures.to_bytes(LAYOUT, structure).hex()


def test_a_device_that_did_as_it_was_told_has_that_sparsity() -> None:
    assert layouts.reached(LAYOUT, told("", 0.0, 0.25), hexed(cut(0.25))) == 0.25
    assert layouts.reached(LAYOUT, told(hexed(cut(0.25)), 0.25, 0.25), hexed(cut(0.25))) == 0.25


@pytest.mark.parametrize("before", [0.0, 0.07, 0.13, 0.21, 0.38])
def test_a_device_that_could_cut_nothing_keeps_what_it_has(before: float) -> None:
    start = cut(before)
    share = structures.sparsity(LAYOUT, start)
    assert layouts.reached(LAYOUT, told(hexed(start), share, 0.5), hexed(start)) == pytest.approx(share)


def test_a_device_that_cut_more_than_it_was_told_or_brings_back_what_was_cut_is_refused() -> None:
    with pytest.raises(WireError, match="were to be left"):
        layouts.reached(LAYOUT, told("", 0.0, 0.1), hexed(cut(0.5)))
    half = cut(0.5)
    with pytest.raises(WireError, match="keep units that were cut"):
        layouts.reached(LAYOUT, told(hexed(half), 0.5, 0.5), hexed(structures.Structure(half.version + 1, WHOLE.kept)))
