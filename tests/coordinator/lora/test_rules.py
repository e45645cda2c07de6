"""Every rule does what its paper says, and tells how far it is from the exact mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.lora import rules
from fleetune.coordinator.lora.factors import Factors, Part
from fleetune.coordinator.lora.rules import Aggregation, LoraFold, Merged, PairFold

ROWS, COLUMNS, RANK = 48, 32, 8
WITHOUT_REST = [name for name, rule in rules.RULES.items() if not rule.has_rest]
Dense = npt.NDArray[np.float64]


def factors(seed: int, rank: int = RANK, scale: float = 2.0) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.standard_normal((ROWS, rank)), rng.standard_normal((rank, COLUMNS)), scale)


def parts_of(seed: int, count: int, rank: int = RANK) -> list[Part]:
    return [Part(f"d{index}", float(10 + 7 * index), factors(seed + index, rank)) for index in range(count)]


def exact(parts: Sequence[Part]) -> Dense:
    total = sum(part.weight for part in parts)
    mean: Dense = np.sum([part.weight / total * part.factors.dense() for part in parts], axis=0)
    return mean


def completed(part: Part, old: Factors) -> Part:
    """With the directions that the device was not given, as they were."""
    rank, own = part.factors.rank, part.factors
    left = np.hstack([own.left * (own.scale / old.scale), old.left[:, rank:]])
    return replace(part, factors=Factors(left, np.vstack([own.right, old.right[rank:]]), old.scale))


def merged(aggregation: Aggregation, parts: Sequence[Part], old: Factors, trained: rules.Trained = "both") -> Merged:
    weights = rules.norm_weights({p.device_id: p.factors.norm() for p in parts}) if rules.RULES[aggregation].by_norm else None
    folding = PairFold(aggregation, old, weights)
    for part in parts:
        folding.add(part)
    return folding.result(trained)


def near(one: Dense, other: Dense) -> bool:
    return bool(np.linalg.norm(one - other) <= 1e-10 * max(1.0, float(np.linalg.norm(other))))


def test_fedit_s_error_is_the_covariance_of_the_factors() -> None:
    parts = parts_of(1, 5)
    found = merged("fedit", parts, factors(0))
    shares = np.array([part.weight for part in parts]) / sum(part.weight for part in parts)
    left, right = found.factors.left, found.factors.right
    covariance = np.sum([p * 2.0 * (i.factors.left - left) @ (i.factors.right - right) for p, i in zip(shares, parts, strict=True)], axis=0)
    assert near(exact(parts) - found.factors.dense(), covariance)
    assert found.aggregation_error == pytest.approx(np.linalg.norm(covariance))
    assert found.norm == pytest.approx(np.linalg.norm(exact(parts)))


@pytest.mark.parametrize("same", ["left", "right"])
def test_fedit_is_exact_where_one_matrix_is_shared(same: str) -> None:
    shared = getattr(factors(99), same)
    parts = [replace(part, factors=replace(part.factors, **{same: shared})) for part in parts_of(3, 4)]
    found = merged("fedit", parts, factors(0))
    assert near(found.factors.dense(), exact(parts))
    assert found.aggregation_error <= 1e-6 * found.norm


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_no_rule_is_nearer_to_the_exact_mean_than_exact(seed: int, count: int) -> None:
    parts, old = parts_of(seed, count), factors(seed + 100)
    errors = {name: merged(name, parts, old).aggregation_error for name in WITHOUT_REST}
    assert all(errors["exact"] <= error * (1 + 1e-6) + 1e-9 for error in errors.values())
    assert errors["exact"] == pytest.approx(errors["flexlora"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, RANK), st.floats(0.25, 8.0)), min_size=1, max_size=6))
def test_exact_is_the_best_pair_for_the_mean_of_all_that_devices_stand_for(seed: int, devices: list[tuple[int, float]]) -> None:
    old = factors(seed)
    parts = [Part(f"d{i}", 1.0 + i, factors(seed + 1 + i, rank, scale)) for i, (rank, scale) in enumerate(devices)]
    mean = exact([completed(part, old) for part in parts])
    left, values, right = np.linalg.svd(mean)
    found = merged("exact", parts, old)
    assert near(found.factors.dense(), (left[:, :RANK] * values[:RANK]) @ right[:RANK])
    assert found.aggregation_error == pytest.approx(np.sqrt(np.sum(values[RANK:] ** 2)), abs=1e-8 * values[0])


def test_a_round_of_small_devices_leaves_what_they_were_not_given() -> None:
    old = merged("exact", parts_of(31, 3), factors(0)).factors
    small = Part("a", 1.0, old.leading(2))
    assert near(merged("exact", [small], old).factors.dense(), old.dense())
    assert near(merged("flexlora", [small], old).factors.dense(), old.leading(2).dense())


def test_flexlora_is_the_mean_of_what_was_sent_alone() -> None:
    old = factors(33)
    parts = [Part(f"d{i}", 1.0 + i, factors(34 + i, rank)) for i, rank in enumerate((2, 3))]
    found = merged("flexlora", parts, old)
    assert near(found.factors.dense(), exact(parts))
    assert found.truncation_error == pytest.approx(0.0, abs=1e-9)
    whole = exact([completed(part, old) for part in parts])
    assert found.aggregation_error == pytest.approx(np.linalg.norm(found.factors.dense() - whole))


def test_a_pruned_device_keeps_the_tail_of_its_own_rows_only() -> None:
    old = factors(35)
    rows = np.array([1, 5, 9])
    own = replace(factors(36, 3), left=factors(36, 3).left[rows])
    found = merged("exact", [Part("a", 2.0, own, rows)], old)
    expected = old.dense()
    expected[rows] = own.dense() + 2.0 * (old.left[rows, 3:] @ old.right[3:])
    left, values, right = np.linalg.svd(expected)
    assert near(found.factors.dense(), (left[:, :RANK] * values[:RANK]) @ right[:RANK])


def test_flexlora_has_the_singular_values_in_b() -> None:
    found = merged("flexlora", parts_of(5, 3), factors(0)).factors
    assert near(found.right @ np.transpose(found.right), np.eye(RANK))


def test_equal_parts_stay_what_they_are_under_every_rule() -> None:
    one = factors(7)
    parts = [Part(f"d{index}", 1.0 + index, one) for index in range(4)]
    for name in WITHOUT_REST:
        assert near(merged(name, parts, one).factors.dense(), one.dense()), name


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, RANK), min_size=1, max_size=5))
def test_ffa_is_exact_for_mixed_ranks(seed: int, ranks: list[int]) -> None:
    old = factors(seed)
    parts = [Part(f"d{i}", 1.0 + i, Factors(factors(seed + 1 + i, rank).left, old.right[:rank], old.scale)) for i, rank in enumerate(ranks)]
    found = merged("ffa", parts, old, "left")
    assert near(found.factors.dense(), exact([completed(part, old) for part in parts]))
    assert found.aggregation_error <= 1e-6 * found.norm
    assert np.array_equal(found.factors.right, old.right)


def test_rolora_trains_b_first_and_is_exact_in_both_kinds_of_rounds() -> None:
    assert [rules.trained("rolora", number) for number in (1, 2, 3)] == ["left", "right", "left"]
    assert {rules.trained("ffa", number) for number in (1, 2)} == {"left"}
    assert {rules.trained("exact", number) for number in (1, 2)} == {"both"}
    old = factors(11)
    parts = [replace(part, factors=replace(part.factors, left=old.left)) for part in parts_of(12, 3)]
    found = merged("rolora", parts, old, "right")
    assert near(found.factors.dense(), exact(parts)) and np.array_equal(found.factors.left, old.left)


def test_hetlora_s_weights_are_the_norms_of_the_products() -> None:
    parts = parts_of(13, 3)
    norms = {part.device_id: float(np.linalg.norm(part.factors.dense())) for part in parts}
    assert [part.factors.norm() for part in parts] == pytest.approx(list(norms.values()))
    weights = rules.norm_weights(norms)
    assert weights == pytest.approx({device: norm / sum(norms.values()) for device, norm in norms.items()})
    found = merged("zero-pad", parts, factors(0)).factors
    assert near(found.left, np.sum([weights[p.device_id] * p.factors.left for p in parts], axis=0))


def test_a_device_that_diverges_weighs_three_times_the_median_at_most() -> None:
    weights = rules.norm_weights({"a": 1.0, "b": 1.0, "c": 1e9})
    assert weights == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.6})
    assert rules.norm_weights({"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}


def test_two_rounds_do_not_add_up() -> None:
    one = factors(15)
    first = merged("zero-pad", [Part("a", 1.0, one)], factors(16)).factors
    assert near(merged("zero-pad", [Part("a", 1.0, one)], first).factors.dense(), one.dense())


REST = 24
FRESH = np.random.default_rng(77).uniform(-0.1, 0.1, (RANK, COLUMNS))


def with_rest(aggregation: Aggregation, parts: Sequence[Part], old: Factors, rest: int = REST) -> Merged:
    folding = PairFold(aggregation, old, None, rest, FRESH if aggregation == "flora" else None)
    for part in parts:
        folding.add(part)
    return folding.result()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, RANK), st.floats(0.25, 8.0)), min_size=1, max_size=5))
def test_flora_keeps_the_exact_mean_in_the_rest_and_begins_anew(seed: int, devices: list[tuple[int, float]]) -> None:
    old = factors(seed, RANK + COLUMNS)
    parts = [Part(f"d{i}", 1.0 + i, factors(seed + 1 + i, rank, scale)) for i, (rank, scale) in enumerate(devices)]
    found = with_rest("flora", parts, old, COLUMNS)
    assert near(found.factors.dense(), exact([completed(part, old) for part in parts]))
    assert np.array_equal(found.factors.right[:RANK], FRESH) and not found.factors.left[:, :RANK].any()
    assert found.aggregation_error <= 1e-9 * found.norm and found.truncation_error == found.aggregation_error


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fedex_goes_on_with_fedit_s_pair_and_a_residual_of_the_rank_that_the_paper_says(count: int) -> None:
    rank = 4
    parts, old = parts_of(19, count, rank), factors(18, rank + REST)
    old = Factors(np.hstack([old.left[:, :rank], np.zeros((ROWS, REST))]), old.right, old.scale)  # a first round: nothing in the rest
    found = with_rest("fedex", parts, old)
    means = merged("fedit", parts, old.leading(rank)).factors
    assert near(found.factors.left[:, :rank], means.left) and near(found.factors.right[:rank], means.right)
    assert near(found.factors.dense(), exact(parts))
    rest = found.factors.left[:, rank:]
    assert int(np.count_nonzero(np.abs(rest).max(axis=0) > 1e-12)) == min((count - 1) * rank, REST)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["flora", "fedex"]), st.integers(1, REST))
def test_what_the_rest_has_no_room_for_is_the_end_of_the_spectrum(seed: int, aggregation: Aggregation, rest: int) -> None:
    old, parts = factors(seed, RANK + rest), parts_of(seed + 1, 4)
    found = with_rest(aggregation, parts, old, rest)
    mean = exact([completed(part, old) for part in parts])
    values = np.linalg.svd(mean - found.factors.leading(RANK).dense(), compute_uv=False)
    error = float(np.linalg.norm(mean - found.factors.dense()))
    assert error == pytest.approx(float(np.linalg.norm(values[rest:])), abs=1e-9 * values[0])
    assert found.truncation_error == pytest.approx(error, abs=1e-8 * values[0]) and found.norm == pytest.approx(np.linalg.norm(mean))


@pytest.mark.parametrize("aggregation", ["flora", "fedex"])
def test_two_rounds_in_which_nothing_is_learned_lose_nothing(aggregation: Aggregation) -> None:
    pair = with_rest(aggregation, parts_of(40, 3), factors(41, RANK + COLUMNS), COLUMNS).factors
    for _ in range(2):
        again = with_rest(aggregation, [Part(f"d{i}", 1.0 + i, pair.leading(RANK)) for i in range(3)], pair, COLUMNS).factors
        assert near(again.dense(), pair.dense())
        pair = again


def test_fresh_rows_are_those_of_their_round_seed_and_name() -> None:
    fold = LoraFold("flora", RANK + REST, 2.0, 3, True, REST, 5)
    first = fold.fresh("m.lora_A.weight", COLUMNS)
    assert first is not None and first.shape == (RANK, COLUMNS)
    assert 0.9 / np.sqrt(COLUMNS) < np.abs(first).max() <= 1 / np.sqrt(COLUMNS) and abs(first.mean()) < 0.03
    same = fold.fresh("m.lora_A.weight", COLUMNS)
    assert same is not None and np.array_equal(first, same)
    others = [replace(fold, round_number=4), replace(fold, seed=6)]
    for other in [found.fresh("m.lora_A.weight", COLUMNS) for found in others] + [fold.fresh("n.lora_A.weight", COLUMNS)]:
        assert other is not None and not np.array_equal(first, other)
    assert replace(fold, aggregation="fedex").fresh("m.lora_A.weight", COLUMNS) is None


def test_fresh_rows_are_the_same_on_every_machine() -> None:
    """Philox's raw bits: what is drawn here is what a fold that is done again elsewhere draws."""
    found = LoraFold("flora", 2, 1.0, 1, True, 1, 0).fresh("m.lora_A.weight", 4)
    assert found is not None
    assert found[0].tolist() == [-0.40441672636173465, 0.41116114573048523, 0.2880141463480739, 0.2814686372251093]


def test_the_difference_of_two_pairs_needs_no_product() -> None:
    one, other = factors(25), factors(26, 3, 0.5)
    assert rules.difference(one, other) == pytest.approx(np.linalg.norm(one.dense() - other.dense()))
