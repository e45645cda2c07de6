"""Kept units as bits: nested, checked, in one canonical form."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune import architectures, sparsity, structures
from fleetune.errors import ModelError, WireError
from fleetune.structures import Keep, Structure

BERT = architectures.layout(
    {"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
)
LLAMA = architectures.layout(
    {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 64,
    }
)  # fmt: skip
QWEN2 = architectures.layout(
    {
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
)  # fmt: skip
LAYOUTS = (BERT, LLAMA, QWEN2)


def at(layout: architectures.Layout, share: float, seed: int = 0) -> Structure:
    draw = random.Random(seed)
    scores = [[draw.random() for _ in range(group.units)] for group in layout.groups]
    return structures.choose(layout, structures.whole(layout), sparsity.keeps(layout, share), scores)


@given(layout=st.sampled_from(LAYOUTS), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_bytes_and_json_give_the_same_structure_back(layout: architectures.Layout, share: float, seed: int) -> None:
    structure = replace(at(layout, share, seed), version=3)
    data = structures.to_bytes(layout, structure)
    assert len(data) == structures.size_bytes(layout)
    assert structures.from_bytes(layout, data) == structure
    assert structures.from_json(layout, json.loads(json.dumps(structures.to_json(layout, structure)))) == structure


def test_people_read_ranges_of_units() -> None:
    kept = (structures.bits_of([0, 1, 2, 5]), *structures.whole(BERT).kept[1:])
    assert structures.to_json(BERT, Structure(1, kept))["groups"][0] == {"name": "layer.0.heads", "units": 6, "kept": "0-2,5"}  # type: ignore[index]


@given(st.binary(max_size=80))
def test_bytes_from_a_stranger_are_refused_or_make_a_sound_structure(data: bytes) -> None:
    genuine = structures.to_bytes(BERT, at(BERT, 0.5))
    for candidate in (data, (genuine[:16] + data)[: len(genuine)], genuine[: len(data)]):
        try:
            found = structures.from_bytes(BERT, candidate)
        except WireError:
            continue
        assert structures.complaint(BERT, found) is None
        assert structures.to_bytes(BERT, found) == candidate


@pytest.mark.parametrize("place", range(16))
def test_every_byte_of_the_head_but_the_version_is_checked(place: int) -> None:
    data = bytearray(structures.to_bytes(BERT, at(BERT, 0.5)))
    data[place] ^= 0x10
    if 12 <= place < 16:
        assert structures.from_bytes(BERT, bytes(data)).version != at(BERT, 0.5).version
    else:
        with pytest.raises(WireError):
            structures.from_bytes(BERT, bytes(data))


def test_bits_of_another_model_are_refused() -> None:
    other = architectures.layout(
        {"model_type": "roberta", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
    )
    with pytest.raises(WireError, match="another model"):
        structures.from_bytes(other, structures.to_bytes(BERT, structures.whole(BERT)))


@pytest.mark.parametrize("kept", ["", "6", "0-6", "3-1", "-1", "0,,1", "0x1", "1-", "0" * 9, "²", "0 - 1", "3,2", "0-2,2", "1,1"])
def test_json_that_names_no_units_of_the_group_is_refused(kept: str) -> None:
    value = structures.to_json(BERT, structures.whole(BERT))
    value["groups"][0]["kept"] = kept  # type: ignore[index]
    with pytest.raises(WireError):
        structures.from_json(BERT, value)


def test_a_group_without_anything_left_is_no_structure() -> None:
    with pytest.raises(ModelError, match=r"layer\.0\.heads keeps nothing"):
        structures.check(BERT, Structure(1, (0, *structures.whole(BERT).kept[1:])))


def test_unequal_query_heads_per_key_value_head_are_refused() -> None:
    with pytest.raises(ModelError, match="keeps 1 and 2 query heads per key/value head"):
        structures.check(LLAMA, Structure(1, (0b01_11_11_11, *structures.whole(LLAMA).kept[1:])))
    structures.check(LLAMA, Structure(1, (0b01_10_00_01, *structures.whole(LLAMA).kept[1:])))


def test_a_key_value_head_stays_as_long_as_one_of_its_query_heads() -> None:
    assert structures.kv_bits(LLAMA.groups[0], 0b01_10_00_01) == 0b1101


@given(layout=st.sampled_from(LAYOUTS), first=st.floats(0, 1), second=st.floats(0, 1))
def test_choosing_again_only_takes_away(layout: architectures.Layout, first: float, second: float) -> None:
    before = at(layout, first, seed=1)
    draw = random.Random(2)
    scores = [[draw.random() for _ in range(group.units)] for group in layout.groups]
    after = structures.choose(layout, before, sparsity.keeps(layout, second), scores)
    assert structures.nested(after, before)
    assert after.version == before.version + (after.kept != before.kept)
    structures.check_step(layout, before, after)


def test_the_best_units_stay_and_ties_go_to_the_lower_number() -> None:
    scores = [[0.5, 0.1, 0.9, 0.5, 0.5, 0.0], [1.0] * 40, [0.0] * 6, [0.0] * 40]
    chosen = structures.choose(BERT, structures.whole(BERT), [Keep(3, 1), Keep(8, 1), Keep(2, 1), Keep(40, 1)], scores)
    assert [structures.units(bits) for bits in chosen.kept[:3]] == [[0, 2, 3], list(range(8)), [0, 1]]


def test_whole_clusters_go_by_the_sum_of_their_heads() -> None:
    scores = [[3.0, 0.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 64, [0.0] * 8, [1.0] * 64]
    chosen = structures.choose(LLAMA, structures.whole(LLAMA), [Keep(2, 2), Keep(64, 1)] * 2, scores)
    assert structures.units(chosen.kept[0]) == [0, 1, 2, 3]


def test_from_few_key_value_heads_the_weakest_query_heads_of_each_go() -> None:
    scores = [[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0], [1.0] * 64, [0.0] * 8, [1.0] * 64]
    chosen = structures.choose(QWEN2, structures.whole(QWEN2), sparsity.keeps(QWEN2, 0.5), scores)
    assert structures.units(chosen.kept[0]) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("version", "heads", "complaint"),
    [
        (2, 0b111111, "would keep units that were cut"),
        (0, 0b000111, "version 0 cannot follow version 1 unchanged"),
        (1, 0b000011, "version 1 cannot follow version 1 changed"),
        (2, 0b000111, "version 2 cannot follow version 1 unchanged"),
    ],
)
def test_a_device_s_next_structure_is_nested_and_newer(version: int, heads: int, complaint: str) -> None:
    rest = structures.whole(BERT).kept[1:]
    with pytest.raises(WireError, match=complaint):
        structures.check_step(BERT, Structure(1, (0b000111, *rest)), Structure(version, (heads, *rest)))


def test_the_same_structure_told_again_is_no_mistake() -> None:
    before = at(BERT, 0.5)
    assert structures.check_step(BERT, before, before) is before


@given(layout=st.sampled_from(LAYOUTS), share=st.floats(0, 1))
def test_sparsity_is_the_share_of_parameters_that_went(layout: architectures.Layout, share: float) -> None:
    structure = at(layout, share)
    assert structures.sparsity(layout, structures.whole(layout)) == 0.0
    kept = structures.parameters(layout, structure)
    assert structures.sparsity(layout, structure) == pytest.approx(1 - kept / layout.prunable_parameters)
