"""Devices of unlike structures get one by vote."""

from __future__ import annotations

from fleetune import architectures, consensus, sparsity, structures

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
