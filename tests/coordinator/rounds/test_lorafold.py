"""The fold of LoRA pairs on files: any ranks, any order, one result; and what is refused."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fleetune.coordinator.lora.rules import RULES, Aggregation, LoraFold
from fleetune.coordinator.rounds import aggregate, lorafold, lorapairs
from fleetune.coordinator.rounds.aggregate import KIND_KEY, Contribution, FoldPlan, FoldResult
from fleetune.coordinator.rounds.lorapairs import Leeway
from fleetune.errors import NotFiniteError, WireError
from fleetune.wire import codec
from support import tensors
from support.tensors import Array

RANK, SCALE = 6, 2.0
RULE = LoraFold("exact", RANK, SCALE, narrower=True)
MODULES = {"m.layer.0.query": (10, 14), "m.layer.0.up": (20, 10)}
Update = tuple[str, int, dict[str, Array], dict[str, str]]
Dense = npt.NDArray[np.float64]


def names(module: str) -> tuple[str, str]:
    return f"{module}.lora_B.weight", f"{module}.lora_A.weight"


def state_of(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {"m.classifier.bias": rng.standard_normal(3).astype(np.float32)}
    for module, (rows, columns) in MODULES.items():
        left, right = names(module)
        found[left] = rng.standard_normal((rows, RANK)).astype(np.float32)
        found[right] = rng.standard_normal((RANK, columns)).astype(np.float32)
    return found


def update_of(
    seed: int, device: str, rank: int, base: Mapping[str, Array], scale: float = SCALE, words: Sequence[str] = ("A", "B")
) -> Update:
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {"m.classifier.bias": rng.standard_normal(3).astype(np.float32)}
    for module in MODULES:
        left, right = names(module)
        if "B" in words:
            found[left] = rng.standard_normal((base[left].shape[0], rank)).astype(np.float32)
        if "A" in words:
            found[right] = rng.standard_normal((rank, base[right].shape[1])).astype(np.float32)
    return device, 10 + seed, found, {} if scale == SCALE else {lorapairs.SCALE_KEY: repr(scale)}


def folded(folder: Path, base: Mapping[str, Array], updates: Sequence[Update], rule: LoraFold = RULE, kind: str = "delta") -> FoldResult:
    contributions = tuple(
        Contribution(device, tensors.write(folder / f"u-{device}", arrays, {KIND_KEY: kind, **metadata}), weight)
        for device, weight, arrays, metadata in updates
    )
    start = tensors.write(folder / "base", base, {"format": "pt"})
    return lorafold.fold(FoldPlan(start, contributions, folder / "out"), rule)


def dense(base: Mapping[str, Array], updates: Sequence[Update], module: str) -> Dense:
    """The mean over those who sent anything of the module, of their whole adapters."""
    left, right = (base[name].astype(np.float64) for name in names(module))
    held = [update for update in updates if any(name in update[2] for name in names(module))]
    mean = np.zeros((len(left), right.shape[1]))
    for _, weight, arrays, metadata in held:
        scale = float(metadata.get(lorapairs.SCALE_KEY, SCALE))
        sent = {name: arrays[name].astype(np.float64) for name in names(module) if name in arrays}
        (rank,) = {array.shape[1] if name.endswith("B.weight") else array.shape[0] for name, array in sent.items()}
        own_left = left[:, :rank] * (SCALE / scale) + sent.get(names(module)[0], 0.0)
        own_right = right[:rank] + sent.get(names(module)[1], 0.0)
        mean += weight * (scale * own_left @ own_right + SCALE * left[:, rank:] @ right[rank:])
    return mean / sum(weight for _, weight, _, _ in held)


def best(matrix: Dense, rank: int = RANK) -> Dense:
    left, values, right = np.linalg.svd(matrix)
    cut: Dense = (left[:, :rank] * values[:rank]) @ right[:rank]
    return cut


def product(state: Mapping[str, Array], module: str) -> Dense:
    left, right = (state[name].astype(np.float64) for name in names(module))
    found: Dense = SCALE * left @ right
    return found


def test_the_state_is_the_best_pair_for_the_dense_mean(tmp_path: Path) -> None:
    base = state_of(0)
    updates = [update_of(1, "a", 2, base), update_of(2, "b", 6, base, 0.5), update_of(3, "c", 4, base, 7.0)]
    result = folded(tmp_path, base, updates)
    after = tensors.read(tmp_path / "out")
    for module in MODULES:
        expected = best(dense(base, updates, module))
        assert np.linalg.norm(product(after, module) - expected) <= 1e-6 * np.linalg.norm(expected)
    weights = [update[1] for update in updates]
    mean = np.average([update[2]["m.classifier.bias"].astype(np.float64) for update in updates], axis=0, weights=weights)
    assert np.allclose(after["m.classifier.bias"], base["m.classifier.bias"] + mean, atol=1e-6)
    assert result.size_bytes == (tmp_path / "out").stat().st_size
    assert result.coverage == dict.fromkeys(base, sum(weights))


@pytest.mark.parametrize("aggregation", ["flora", "fedex"])
def test_the_rest_is_what_the_pair_does_not_say_of_the_mean(tmp_path: Path, aggregation: Aggregation) -> None:
    base, rest = state_of(50), 4
    rule = LoraFold(aggregation, RANK, SCALE, 7, narrower=True, residual_rank=rest, seed=3)
    updates = [update_of(index, f"d{index}", RANK - rest, base) for index in range(3)]
    result = folded(tmp_path, base, updates, rule)
    after = tensors.read(tmp_path / "out")
    errors, norms = 0.0, 0.0
    for module in MODULES:
        left, right = names(module)
        trained = {left: after[left][:, :-rest].astype(np.float64), right: after[right][:-rest].astype(np.float64)}
        if aggregation == "flora":
            fresh = rule.fresh(right, base[right].shape[1])
            assert fresh is not None and np.array_equal(after[right][:-rest], fresh.astype(np.float32))
            assert not trained[left].any()
        else:
            total = sum(update[1] for update in updates)
            for name, begun in ((left, base[left][:, :-rest]), (right, base[right][:-rest])):
                moved = [update[1] / total * (begun.astype(np.float64) + update[2][name].astype(np.float64)) for update in updates]
                assert np.allclose(trained[name], np.sum(moved, axis=0), atol=1e-5)
        missing = dense(base, updates, module) - SCALE * trained[left] @ trained[right]
        expected = best(missing, rest)
        got = SCALE * after[left][:, -rest:].astype(np.float64) @ after[right][-rest:].astype(np.float64)
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
        errors += float(np.linalg.norm(missing - expected)) ** 2
        norms += float(np.linalg.norm(dense(base, updates, module))) ** 2
    assert result.metrics == pytest.approx(dict.fromkeys(("aggregation_error", "truncation_error"), np.sqrt(errors / norms)), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["flora", "fedex"])
def test_nobody_sends_of_the_rest(tmp_path: Path, aggregation: Aggregation) -> None:
    base = state_of(51)
    rule = LoraFold(aggregation, RANK, SCALE, narrower=True, residual_rank=2)
    with pytest.raises(WireError, match=f"has the rank {RANK}; 1 to {RANK - 2} is asked for"):
        folded(tmp_path, base, [update_of(1, "a", RANK, base)], rule)


def test_the_order_of_arrival_changes_no_byte(tmp_path: Path) -> None:
    base = state_of(4)
    updates = [update_of(index, f"d{index}", 1 + index % RANK, base) for index in range(9)]
    found: set[str] = set()
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found.add(folded(folder, base, random.Random(seed).sample(updates, len(updates))).digest)
    assert len(found) == 1


def test_updates_of_other_ranks_types_and_orders_count_by_their_names(tmp_path: Path) -> None:
    """One sends rank 4 where 6 was ordered and in half precision, one in bfloat16 with its tensors in another order."""
    base = state_of(7)
    low, other = update_of(1, "a", 4, base), update_of(2, "b", 6, base)
    half = {name: array.astype(np.float16) for name, array in low[2].items()}
    brain = {name: array.astype(tensors.DTYPES["BF16"]) for name, array in other[2].items()}
    start = tensors.write(tmp_path / "base", base, {"format": "pt"})
    first = tensors.write(tmp_path / "u-a", half, {KIND_KEY: "delta"})
    second = shuffled(tmp_path / "u-b", brain, {KIND_KEY: "delta"})
    leeway = Leeway(RANK)
    for path in (first, second):
        assert aggregate.inspect(path, codec.read_table(start), leeway=leeway).finite
    lorafold.fold(FoldPlan(start, (Contribution("a", first, 11), Contribution("b", second, 12)), tmp_path / "out"), RULE)
    updates = [(name, weight, sent, metadata) for (name, weight, _, metadata), sent in zip((low, other), (half, brain), strict=True)]
    after = tensors.read(tmp_path / "out")
    for module in MODULES:
        expected = best(dense(base, updates, module))
        assert np.linalg.norm(product(after, module) - expected) <= 1e-6 * np.linalg.norm(expected)


def shuffled(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> Path:
    """A tensor file whose data lie in the reverse order of their names."""
    specs: list[codec.TensorSpec] = []
    begin = 0
    for name in sorted(arrays, reverse=True):
        array = arrays[name]
        specs.append(codec.TensorSpec(name, tensors.WORDS[array.dtype], array.shape, begin, begin + array.nbytes))
        begin += array.nbytes
    path.write_bytes(codec.build_header(specs, metadata) + b"".join(arrays[spec.name].tobytes() for spec in specs))
    return path


@pytest.mark.parametrize("aggregation", sorted(RULES))
def test_every_rule_folds_to_the_same_bytes_again(tmp_path: Path, aggregation: Aggregation) -> None:
    rest = 2 if RULES[aggregation].has_rest else 0
    rule = replace(RULE, aggregation=aggregation, residual_rank=rest)
    base = state_of(5)
    words = {"left": "B", "right": "A", "both": "AB"}[rule.trained]
    updates = [update_of(index, f"d{index}", min(2 + index, RANK - rest), base, words=words) for index in range(4)]
    found: set[str] = set()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        found.add(folded(tmp_path / name, base, updates, rule).digest)
    assert len(found) == 1


def test_a_matrix_that_was_not_sent_has_not_moved(tmp_path: Path) -> None:
    base = state_of(6)
    updates = [update_of(1, "a", 3, base, words="B"), update_of(2, "b", 5, base, words="A")]
    folded(tmp_path, base, updates)
    after = tensors.read(tmp_path / "out")
    for module in MODULES:
        assert np.allclose(product(after, module), best(dense(base, updates, module)), atol=1e-4)


def test_a_module_that_nobody_sent_keeps_its_bytes(tmp_path: Path) -> None:
    base = state_of(7)
    device, weight, arrays, metadata = update_of(1, "a", 3, base)
    kept, trained = MODULES
    for name in names(kept):
        del arrays[name]
    folded(tmp_path, base, [(device, weight, arrays, metadata)])
    after = tensors.read(tmp_path / "out")
    assert all(np.array_equal(after[name], base[name]) for name in names(kept))
    assert not np.array_equal(product(after, trained), product(base, trained))


def test_states_are_taken_as_they_are(tmp_path: Path) -> None:
    base = state_of(8)
    update = update_of(1, "a", RANK, base)
    folded(tmp_path, base, [update], kind="state")
    after = tensors.read(tmp_path / "out")
    for module in MODULES:
        assert np.allclose(product(after, module), product(update[2], module), atol=1e-4)
    assert np.array_equal(after["m.classifier.bias"], update[2]["m.classifier.bias"])


def test_no_updates_leave_the_state(tmp_path: Path) -> None:
    base = state_of(9)
    result = folded(tmp_path, base, [])
    assert (tmp_path / "out").read_bytes() == (tmp_path / "base").read_bytes()
    assert result.metrics == {}


def test_the_norm_of_a_round_is_how_far_the_products_have_moved(tmp_path: Path) -> None:
    base = state_of(10)
    result = folded(tmp_path, base, [update_of(1, "a", 4, base), update_of(2, "b", 2, base)])
    after = tensors.read(tmp_path / "out")
    moved = sum(float(np.sum((product(after, module) - product(base, module)) ** 2)) for module in MODULES)
    moved += float(np.sum((after["m.classifier.bias"].astype(np.float64) - base["m.classifier.bias"].astype(np.float64)) ** 2))
    assert result.update_norm == pytest.approx(np.sqrt(moved), rel=1e-4)


def test_with_equal_ranks_fedit_is_the_plain_fold_and_tells_its_error(tmp_path: Path) -> None:
    base = state_of(11)
    updates = [update_of(index, f"d{index}", RANK, base) for index in range(3)]
    result = folded(tmp_path, base, updates, LoraFold("fedit", RANK, SCALE))
    contributions = tuple(Contribution(device, tmp_path / f"u-{device}", weight) for device, weight, _, _ in updates)
    assert result.digest == aggregate.fold(FoldPlan(tmp_path / "base", contributions, tmp_path / "plain")).digest
    after = tensors.read(tmp_path / "out")
    errors = sum(float(np.sum((product(after, module) - dense(base, updates, module)) ** 2)) for module in MODULES)
    norms = sum(float(np.sum(dense(base, updates, module) ** 2)) for module in MODULES)
    assert result.metrics == pytest.approx({"aggregation_error": np.sqrt(errors / norms)}, rel=1e-4)


def test_memory_does_not_grow_with_the_number_of_devices(tmp_path: Path) -> None:
    base = state_of(12)
    peaks: list[int] = []
    for count in (20, 200):
        folder = tmp_path / str(count)
        folder.mkdir()
        folded(folder, base, updates := [update_of(index % 7, f"d{index:03}", 4, base) for index in range(count)])
        contributions = tuple(Contribution(device, folder / f"u-{device}", weight) for device, weight, _, _ in updates)
        tracemalloc.start()
        lorafold.fold(FoldPlan(folder / "base", contributions, folder / "out"), RULE)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What is left are the open files' own entries, some hundred bytes a device.
    assert peaks[1] - peaks[0] < 180 * 2000


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda arrays: arrays.update({names("m.layer.0.up")[1]: np.zeros((RANK + 1, 10), np.float32)}), "rank"),
        (lambda arrays: arrays.update({names("m.layer.0.up")[0]: np.zeros((20, 2), np.float32)}), "shape"),
        (lambda arrays: arrays.update({names("m.layer.0.up")[1]: np.zeros((0, 10), np.float32)}), "rank"),
        (lambda arrays: arrays.update({names("m.layer.0.up")[1]: np.zeros((3, 9), np.float32)}), "shape"),
        (lambda arrays: arrays.update({names("m.layer.0.up")[1]: np.zeros(10, np.float32)}), "shape"),
        (lambda arrays: arrays.update({"m.layer.0.up.lora_C.weight": np.zeros((3, 10), np.float32)}), "none of that name"),
    ],
)
def test_matrices_that_fit_no_rank_are_refused(tmp_path: Path, spoil: object, said: str) -> None:
    base = state_of(13)
    device, weight, arrays, metadata = update_of(1, "a", 3, base)
    assert callable(spoil)
    spoil(arrays)
    path = tensors.write(tmp_path / "update", arrays, {KIND_KEY: "delta"})
    with pytest.raises(WireError, match=said):
        aggregate.inspect(path, codec.read_table(tensors.write(tmp_path / "base", base, {})), leeway=Leeway(RANK))
    with pytest.raises(WireError, match=said):
        folded(tmp_path, base, [(device, weight, arrays, metadata)])


def test_a_device_sends_no_more_than_it_was_asked_for_but_may_send_less(tmp_path: Path) -> None:
    base = state_of(14)
    expected = codec.read_table(tensors.write(tmp_path / "base", base, {}))
    for rank in (1, 2, 3, 4):
        path = tensors.write(tmp_path / "update", update_of(1, "a", rank, base)[2], {KIND_KEY: "delta"})
        if rank <= 3:
            assert aggregate.inspect(path, expected, leeway=Leeway(3)).finite
            with pytest.raises(WireError, match="shape"):
                aggregate.inspect(path, expected)
        else:
            with pytest.raises(WireError, match="1 to 3 is asked for"):
                aggregate.inspect(path, expected, leeway=Leeway(3))


@pytest.mark.parametrize("word", ["0", "-1", "nan", "inf", "two", "1e7", "1" * 40, ""])
def test_what_is_no_scale_is_refused(tmp_path: Path, word: str) -> None:
    base = state_of(15)
    device, weight, arrays, _ = update_of(1, "a", 3, base)
    with pytest.raises(WireError, match="lora_scale"):
        folded(tmp_path, base, [(device, weight, arrays, {lorapairs.SCALE_KEY: word})])


def test_what_is_not_finite_spoils_no_state(tmp_path: Path) -> None:
    base = state_of(16)
    device, weight, arrays, metadata = update_of(1, "a", 3, base)
    arrays[names("m.layer.0.up")[0]][0, 0] = np.nan
    with pytest.raises(NotFiniteError):
        folded(tmp_path, base, [(device, weight, arrays, metadata)])
    assert not (tmp_path / "out").exists()


def test_pairs_are_known_by_their_names() -> None:
    specs = codec.pack(
        [
            ("a.lora_A.weight", "F32", (4, 6)),
            ("a.lora_B.weight", "F32", (5, 4)),
            ("b.lora_embedding_A", "F32", (4, 9)),
            ("b.lora_embedding_B", "F32", (7, 4)),
            ("c.lora_A.weight", "F32", (4, 6)),
            ("d.weight", "F32", (4, 6)),
        ]
    )
    found = lorapairs.pairs_of(codec.TensorTable(specs, {}, 0, 0))
    assert sorted(found) == ["a.lora_A.weight", "a.lora_B.weight", "b.lora_embedding_A", "b.lora_embedding_B"]
    assert [lorapairs.side_of(name) for name in ("a.lora_A.weight", "b.lora_embedding_B", "d.weight")] == ["right", "left", None]
