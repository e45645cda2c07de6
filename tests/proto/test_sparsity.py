"""The pace of pruning: cubic inside a round, bounded between rounds, never back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune import architectures, sparsity, structures
from fleetune.sparsity import Round
from fleetune.structures import Keep

CONFIGS = (
    {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 1536},
    {"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 36},
    {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
     "intermediate_size": 64},
    {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 8,
     "intermediate_size": 64},
    {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 1,
     "intermediate_size": 64},
    {"model_type": "t5", "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6},
)  # fmt: skip
LAYOUTS = [architectures.layout(config) for config in CONFIGS]


def test_a_round_of_three_events_by_hand() -> None:
    found = Round(before=0.1, after=0.2, events=3, tau=20)
    assert [found.sparsity(event) for event in (1, 2, 3)] == pytest.approx([0.1 + 0.1 * 19 / 27, 0.1 + 0.1 * 26 / 27, 0.2])
    assert [step for step in range(70) if found.at(step) is not None] == [0, 20, 40]
    assert found.at(40) == 0.2


@given(before=st.floats(0, 0.95), pace=st.floats(0, 1), target=st.floats(0, 0.95), steps=st.integers(0, 500))
def test_a_round_never_goes_back_nor_beyond_its_bounds(before: float, pace: float, target: float, steps: int) -> None:
    found = sparsity.round_of(before, pace, target, steps)
    assert before <= found.after <= max(before, target) + 1e-12
    assert found.after - before <= sparsity.STEP_MAX + 1e-12
    values = [found.sparsity(event) for event in range(found.events + 1)]
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
    assert values[-1] == found.after


def test_full_pace_reaches_the_target_in_as_many_rounds_as_the_bound_demands() -> None:
    share, rounds = 0.0, 0
    while share < 0.5 - 1e-9:
        share, rounds = sparsity.round_of(share, 1.0, 0.5, steps=60).after, rounds + 1
    assert rounds == 5


def test_what_little_is_left_to_the_target_goes_in_the_same_round() -> None:
    shares = [0.38]
    while shares[-1] < 0.5:
        shares.append(sparsity.round_of(shares[-1], 0.5, 0.5, steps=60).after)
    assert shares == pytest.approx([0.38, 0.43, 0.465, 0.5])
    assert sparsity.round_of(0.49, 0.0, 0.5, steps=60).after == 0.49, "a pace of nothing cuts nothing"
    assert sparsity.round_of(0.5, 0.5, 0.5, steps=60).after == 0.5


@pytest.mark.parametrize(("pace", "target"), [(-0.1, 0.5), (1.1, 0.5), (0.5, 0.96), (float("nan"), 0.5)])
def test_a_pace_or_target_out_of_bounds_is_refused(pace: float, target: float) -> None:
    with pytest.raises(ValueError, match="is allowed"):
        sparsity.round_of(0.0, pace, target, steps=20)


@pytest.mark.parametrize(("share", "heads", "neurons"), [(0.0, 12, 1536), (0.25, 9, 1152), (0.5, 6, 768), (1.0, 1, 8)])
def test_minilm_keeps_the_same_share_everywhere(share: float, heads: int, neurons: int) -> None:
    assert [keep.units for keep in sparsity.keeps(LAYOUTS[0], share)] == [heads, neurons] * 2


@given(layout=st.sampled_from(LAYOUTS), first=st.floats(0, 1), second=st.floats(0, 1))
def test_no_group_keeps_more_at_a_higher_sparsity(layout: architectures.Layout, first: float, second: float) -> None:
    low, high = sorted((first, second))
    for group, many, few in zip(layout.groups, sparsity.keeps(layout, low), sparsity.keeps(layout, high), strict=True):
        assert 1 <= few.clusters <= many.clusters and 1 <= few.each <= many.each
        assert many.units <= group.units
        if group.kind == "neurons" and many.units < group.units:
            assert many.units % 8 == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_goes_at_no_sparsity(layout: architectures.Layout) -> None:
    assert [keep.units for keep in sparsity.keeps(layout, 0.0)] == [group.units for group in layout.groups]


def test_one_key_value_head_keeps_some_of_its_query_heads() -> None:
    assert sparsity.keeps(LAYOUTS[4], 0.5)[0] == Keep(1, 4)


def test_the_structure_has_about_the_sparsity_that_was_asked_for() -> None:
    layout = LAYOUTS[0]
    scores = [[1.0] * group.units for group in layout.groups]
    for share in (0.1, 0.25, 0.5):
        found = structures.choose(layout, structures.whole(layout), sparsity.keeps(layout, share), scores)
        assert structures.sparsity(layout, found) == pytest.approx(share, abs=0.03)
