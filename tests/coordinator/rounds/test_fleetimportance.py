"""The mean of what devices tell of their heads and neurons."""

from __future__ import annotations

import itertools

import pytest

from fleetune import architectures, importances
from fleetune.coordinator.domain import Blob, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import fleetimportance

LAYOUT = architectures.layout(
    {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
)


def told(*values: float) -> str:
    """Of four heads; neurons matter alike."""
    return importances.to_text([list(values), [1.0] * 8])


def entry(*texts: str | None) -> RoundEntry:
    """A round in which devices told these; None: one without an update."""
    found = RoundEntry(1, "committed", 0.0)
    for number, text in enumerate(texts):
        update = Update(Blob("0" * 64, 1), 10**number, importance=text) if text is not None else None
        found.tasks[str(number)] = TaskEntry(str(number), f"d{number}", "", "train", 1, "done" if update else "missed", update=update)
    return found


def test_devices_count_alike_and_a_unit_that_one_has_cut_matters_less_by_it() -> None:
    found = importances.from_text(LAYOUT, fleetimportance.mean(entry(told(1, 1, 1, 1), told(0, 2, 1, 1), None, "")))
    # The second one's mean is that of its three units that are left.
    assert found[0] == pytest.approx([0.5, 1.25, 0.875, 0.875], rel=0.05)
    assert found[1] == pytest.approx([1.0] * 8, rel=0.05)


def test_the_mean_is_the_same_in_every_order() -> None:
    texts = [told(1, 2, 3, 4), told(4, 1, 1, 1), told(0, 9, 1, 1)]
    assert len({fleetimportance.mean(entry(*order)) for order in itertools.permutations(texts)}) == 1


def test_a_device_whose_gradients_are_large_speaks_no_louder() -> None:
    assert fleetimportance.mean(entry(told(1, 2, 3, 4), told(4, 3, 2, 1))) == fleetimportance.mean(
        entry(told(1e6, 2e6, 3e6, 4e6), told(4, 3, 2, 1))
    )


def test_nothing_is_known_where_nobody_tells() -> None:
    assert fleetimportance.mean(entry(None, "")) == ""


def test_a_round_forgets_what_each_device_told_and_nothing_else() -> None:
    round_ = entry(told(1, 1, 1, 1), None)
    fleetimportance.drop(round_)
    update = round_.tasks["0"].update
    assert update == Update(Blob("0" * 64, 1), 1)
