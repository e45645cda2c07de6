"""Devices of unlike structures get one by vote."""

from __future__ import annotations

import pytest

from fleetune import architectures, consensus, importances, sparsity, structures
from fleetune.errors import WireError

BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def test_what_most_of_the_rows_have_kept_stays() -> None:
    layout = architectures.layout(BERT)
    half = sparsity.keeps(layout, 0.5)
    low, high = (
        structures.choose(layout, structures.whole(layout), half, [[sign * unit for unit in range(g.units)] for g in layout.groups])
        for sign in (-1.0, 1.0)
    )
    assert consensus.voted(layout, [(low, 3), (high, 5)], [0.5, 0.5]).kept == high.kept
    assert consensus.voted(layout, [(low, 3), (high, 2)], [0.5, 0.5]).kept == low.kept
    assert consensus.voted(layout, [], []) == structures.whole(layout)


def test_the_vote_has_the_devices_median_sparsity() -> None:
    layout = architectures.layout(BERT)
    whole = structures.whole(layout)
    found = consensus.voted(layout, [(whole, 1)] * 3, [0.25, 0.25, 0.5])
    assert [structures.count(bits) for bits in found.kept] == [keep.units for keep in sparsity.keeps(layout, 0.25)]


def test_importance_decides_among_units_that_as_many_have_kept_and_never_against_a_majority() -> None:
    layout = architectures.layout(BERT)
    half = sparsity.keeps(layout, 0.5)
    low, high = (
        structures.choose(layout, structures.whole(layout), half, [[sign * unit for unit in range(g.units)] for g in layout.groups])
        for sign in (-1.0, 1.0)
    )
    rising = [[float(unit) for unit in range(group.units)] for group in layout.groups]
    loud = [[1e6 * (group.units - unit) for unit in range(group.units)] for group in layout.groups]
    even = [(low, 1), (high, 1)]
    assert consensus.voted(layout, even, [0.5, 0.5]).kept == low.kept, "the lower number where nothing else is known"
    assert consensus.voted(layout, even, [0.5, 0.5], [rising, rising]).kept == high.kept
    assert consensus.voted(layout, even, [0.5, 0.5], [None, rising]).kept == high.kept
    assert consensus.voted(layout, [(low, 2), (high, 3)], [0.5, 0.5], [loud, loud]).kept == high.kept


def test_a_device_s_importance_counts_by_its_rows_however_loud_its_scores_are() -> None:
    layout = architectures.layout(BERT)
    whole = structures.whole(layout)
    rising = [[float(unit) for unit in range(group.units)] for group in layout.groups]
    falling = [[1e9 * (group.units - 1 - unit) for unit in range(group.units)] for group in layout.groups]
    found = consensus.voted(layout, [(whole, 3), (whole, 1)], [0.5, 0.5], [rising, falling])
    assert [structures.units(bits)[-1] for bits in found.kept] == [group.units - 1 for group in layout.groups]


def test_importance_is_a_byte_for_each_unit() -> None:
    layout = architectures.layout(BERT)
    scores = [[0.0] * group.units for group in layout.groups]
    scores[0][1], scores[0][2] = 4.0, 1.0
    back = importances.from_text(layout, importances.to_text(scores))
    assert back[0] == pytest.approx([0.0, 1.6, 0.4, 0.0], rel=0.02), "to a mean of 1 over those that are not 0"
    assert all(set(group) == {0.0} for group in back[1:])
    assert importances.is_told(layout)


def test_units_that_matter_little_are_told_apart_and_one_that_matters_most_of_all_takes_no_room_from_them() -> None:
    layout = architectures.layout(BERT)
    neurons = next(place for place, group in enumerate(layout.groups) if group.kind == "neurons")
    scores = [[1.0] * group.units for group in layout.groups]
    scores[neurons] = [0.01 * (unit + 1) for unit in range(63)] + [1e6]
    back = importances.from_text(layout, importances.to_text(scores))[neurons]
    assert back[-1] == importances.SPAN
    scores[neurons][-1] = 1.0
    back = importances.from_text(layout, importances.to_text(scores))[neurons]
    assert sorted(back) == back and len(set(back[:40])) > 30


@pytest.mark.parametrize("text", ["", "AAAA", "?" * 200, "A" * 100_000, "\u00e9" * 180])
def test_what_is_no_importance_of_the_layout_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="136 bytes in base64 are needed"):
        importances.from_text(architectures.layout(BERT), text)
