"""Budgets of ranks, and whose triplets stay."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.rounds import arbitration
from fleetune.coordinator.rounds.arbitration import Budget, Scored

RANKS = {"a": 2, "b": 3, "c": 1}


def test_the_budget_stays_falls_and_stays() -> None:
    found = arbitration.budget(modules=6, rank_first=12, rank_last=3, rounds=20)
    values = [found.at(number) for number in range(1, 21)]
    assert values[:2] == [72, 72]
    assert values[-7:] == [18] * 7
    assert all(earlier >= later for earlier, later in itertools.pairwise(values))
    assert values[2] < 72


@given(first=st.integers(0, 500), fall=st.integers(0, 500), rounds=st.integers(1, 60), warm=st.integers(0, 60), final=st.integers(0, 60))
def test_any_budget_falls_steadily_from_first_to_last(first: int, fall: int, rounds: int, warm: int, final: int) -> None:
    last = max(0, first - fall)
    found = Budget(first, last, rounds, warm, final)
    values = [found.at(number) for number in range(1, rounds + 1)]
    assert all(last <= value <= first for value in values)
    assert all(earlier >= later for earlier, later in itertools.pairwise(values))


def test_the_best_mean_scores_stay() -> None:
    devices = [
        Scored(1.0, {"a": [0.9, 0.1], "b": [0.2, 0.3, 0.4], "c": [0.0]}),
        Scored(3.0, {"a": [0.1, 0.1], "b": [0.9, 0.3, 0.1], "c": [0.0]}),
    ]
    found = arbitration.by_score(RANKS, devices, wanted=3)
    assert found == {"a": (True, False), "b": (True, True, False), "c": (False,)}
    assert arbitration.remaining(found) == {"a": 1, "b": 2}


def test_half_of_the_votes_elect_a_triplet_that_has_a_low_mean() -> None:
    devices = [Scored(0.5, {"a": [0.3, 0.2], "b": [0.1, 0.0, 0.0], "c": [0.0]})] * 2
    devices += [Scored(0.9, {"a": [0.0, 0.0], "b": [0.0, 9.0, 0.0], "c": [8.0]})]
    assert arbitration.by_vote(RANKS, devices, wanted=2) == {"a": (True, True), "b": (False,) * 3, "c": (False,)}
    assert arbitration.by_score(RANKS, devices, wanted=2) == {"a": (False, False), "b": (False, True, False), "c": (True,)}


def test_a_device_that_does_not_hold_a_triplet_has_no_say_in_it() -> None:
    devices = [
        Scored(1.0, {"a": [math.nan, 0.5], "b": [0.4, 0.4, 0.4]}),
        Scored(1.0, {"a": [0.9, 0.5], "b": [0.4, 0.4, 0.4], "c": [0.6]}),
    ]
    found = arbitration.by_score(RANKS, devices, wanted=3)
    assert found == {"a": (True, True), "b": (False,) * 3, "c": (True,)}


def test_the_least_is_what_nobody_scored() -> None:
    assert arbitration.by_score({"a": 2}, [Scored(1.0, {"a": [math.nan, 0.0]})], wanted=1) == {"a": (False, True)}


def test_scores_of_another_round_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 2 triplets, a device scored 3"):
        arbitration.by_score(RANKS, [Scored(1.0, {"a": [1.0, 2.0, 3.0]})], wanted=1)


Rule = st.sampled_from([arbitration.by_score, arbitration.by_vote])


@given(rule=Rule, ranks=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 6)), wanted=st.integers(0, 40), seed=st.integers(0, 99))
def test_exactly_the_budget_is_alive_whatever_the_scores(rule, ranks: dict[str, int], wanted: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(seed)
    devices = [
        Scored(draw.uniform(0.1, 5), {name: [draw.choice([0.0, draw.random()]) for _ in range(rank)] for name, rank in ranks.items()})
        for _ in range(4)
    ]
    alive = rule(ranks, devices, wanted)
    assert {name: len(mask) for name, mask in alive.items()} == ranks
    assert sum(sum(mask) for mask in alive.values()) == min(wanted, sum(ranks.values()))
    draw.shuffle(devices)
    assert rule(ranks, devices, wanted) == alive


def test_nothing_is_dropped_where_the_budget_is_what_there_is() -> None:
    assert arbitration.by_score(RANKS, [], wanted=6) == {"a": (True, True), "b": (True,) * 3, "c": (True,)}


def test_bytes_fall_with_the_budget() -> None:
    shapes = {"a": (48, 32), "b": (32, 48), "c": (16, 16)}
    devices = [Scored(1.0, {"a": [0.5, 0.4], "b": [0.3, 0.2, 0.1], "c": [0.6]})]
    whole = arbitration.payload_bytes(RANKS, shapes, 2)
    assert whole == 2 * (5 * 81 + 33)
    sizes = [whole]
    for wanted in (5, 4, 2, 0):
        sizes.append(arbitration.payload_bytes(arbitration.remaining(arbitration.by_score(RANKS, devices, wanted)), shapes, 2))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5 and sizes[-1] == 0
