"""The fold equals a plain float64 mean, to the byte, whatever the order, the slab and the number of devices."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.rounds import aggregate, contributions, slabs
from fleetune.coordinator.rounds.aggregate import Contribution, FoldPlan, FoldResult, fold, inspect
from fleetune.coordinator.rounds.optimizers import FedAdam, FedAvgM, FedYogi, ServerOptimizer
from fleetune.errors import NotFiniteError, WireError
from fleetune.wire import codec
from support import tensors
from support.tensors import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "c.weight": (2, 2, 2), "d.empty": (0, 4), "e.scalar": ()}
Update = tuple[str, int, Mapping[str, Array]]


def state_of(rng: np.random.Generator, dtype: str = "F32", shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Array]:
    return {name: rng.standard_normal(shape).astype(tensors.DTYPES[dtype]) for name, shape in shapes.items()}


def folded(
    folder: Path, base: Mapping[str, Array], updates: Sequence[Update], kind: str = "delta", slab_bytes: int = 1 << 20
) -> tuple[FoldResult, Path]:
    plan = FoldPlan(
        tensors.write(folder / "base", base, {"format": "pt"}), contributed(folder, updates, kind), folder / "out", slab_bytes=slab_bytes
    )
    return fold(plan), plan.out_state


def contributed(folder: Path, updates: Sequence[Update], kind: str = "delta") -> tuple[Contribution, ...]:
    return tuple(
        Contribution(device, tensors.write(folder / f"update-{device}", arrays, {aggregate.KIND_KEY: kind}), weight)
        for device, weight, arrays in updates
    )


def mean(name: str, updates: Sequence[Update]) -> tuple[npt.NDArray[np.float64] | None, int]:
    """Weighted mean of a tensor over the updates that hold it, in device order, and the weights' sum."""
    total: npt.NDArray[np.float64] | None = None
    weights = 0
    for _, weight, arrays in sorted(updates, key=lambda update: update[0]):
        if name in arrays:
            part = arrays[name].astype(np.float64) * weight
            total = part if total is None else total + part
            weights += weight
    return (None, 0) if total is None else (total / weights, weights)


def oracle(base: Mapping[str, Array], updates: Sequence[Update], kind: str) -> tuple[dict[str, Array], dict[str, int]]:
    new: dict[str, Array] = {}
    coverage: dict[str, int] = {}
    for name, old in base.items():
        value, coverage[name] = mean(name, updates)
        if value is None:
            new[name] = old
        else:
            new[name] = (old.astype(np.float64) + value if kind == "delta" else value).astype(old.dtype)
    return new, coverage


def same_bytes(found: Mapping[str, Array], expected: Mapping[str, Array]) -> bool:
    return {name: array.tobytes() for name, array in found.items()} == {name: array.tobytes() for name, array in expected.items()}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_fold_is_the_weighted_mean_over_those_that_hold_a_tensor(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    base = state_of(rng, data.draw(st.sampled_from(["F32", "F16"])))
    updates: list[Update] = []
    for index in range(data.draw(st.integers(1, 5))):
        names = data.draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
        dtype = data.draw(st.sampled_from(["F32", "F16", "BF16"]))
        updates.append((f"device-{index}", data.draw(st.integers(1, 10_000)), state_of(rng, dtype, {name: SHAPES[name] for name in names})))
    kind = data.draw(st.sampled_from(["delta", "state"]))
    slab_bytes = data.draw(st.sampled_from([1, 64, 200, 1 << 20]))
    expected, coverage = oracle(base, updates, kind)
    with tempfile.TemporaryDirectory() as folder:
        result, path = folded(Path(folder), base, data.draw(st.permutations(updates)), kind, slab_bytes)
        assert same_bytes(tensors.read(path), expected)
        assert result.digest == blake3(path.read_bytes()).hexdigest()
        assert result.size_bytes == path.stat().st_size
        assert codec.read_table(path).metadata == {"format": "pt"}
    assert dict(result.coverage) == coverage
    deltas = [
        value - (0 if kind == "delta" else base[name].astype(np.float64)) for name in base if (value := mean(name, updates)[0]) is not None
    ]
    assert result.update_norm == pytest.approx(np.sqrt(sum(float((delta**2).sum()) for delta in deltas)), rel=1e-12)


def test_every_order_of_arrival_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = state_of(rng)
    # Large parts that cancel out: in float64, what is left does depend on the order of the sum.
    large = {name: array * np.float32(1e12) for name, array in state_of(rng).items()}
    updates: list[Update] = []
    for index in range(6):
        sign = np.float32(1 - index % 2 * 2)
        updates.append((f"large-{index}", 1 + index // 2 * 7919, {name: array * sign for name, array in large.items()}))
        updates.append((f"small-{index}", 1 + index * 7919, state_of(rng)))
    digests = set()
    for seed in range(10):
        random.Random(seed).shuffle(updates)
        folder = tmp_path / str(seed)
        folder.mkdir()
        digests.add(folded(folder, base, updates, slab_bytes=[64, 1 << 20][seed % 2])[0].digest)
    assert len(digests) == 1


def test_more_devices_than_open_files_give_the_same_mean(tmp_path: Path) -> None:
    base = {"a": np.arange(1000, dtype=np.float32)}
    count = contributions.OPEN_FILES + 11
    updates: list[Update] = [(f"device-{index:03}", 1, {"a": np.full(1000, index, np.float32)}) for index in range(count)]
    _, path = folded(tmp_path, base, updates, slab_bytes=4096)
    assert same_bytes(tensors.read(path), {"a": base["a"] + np.float32((count - 1) / 2)})


def test_whole_numbers_are_folded_exactly(tmp_path: Path) -> None:
    base = {"a": np.arange(-500, 500, dtype=np.float32) * 1000}
    updates: list[Update] = [(f"device-{index}", 8, {"a": base["a"] + np.float32(index)}) for index in range(5)]
    _, path = folded(tmp_path, base, updates, "state")
    assert same_bytes(tensors.read(path), {"a": base["a"] + np.float32(2)})


def test_bfloat16_loses_no_bit_on_the_way(tmp_path: Path) -> None:
    every = np.arange(65536, dtype=np.uint16).view(BFLOAT16)
    finite: Array = every[np.isfinite(every.astype(np.float32))]
    # Through a float32 state and through a bfloat16 state; -0 + 0 is 0, as in any addition.
    for dtype in (np.dtype(np.float32), BFLOAT16):
        folder = tmp_path / dtype.name
        folder.mkdir()
        _, path = folded(folder, {"a": np.zeros(len(finite), dtype)}, [("one", 3, {"a": finite})], "state")
        assert same_bytes(tensors.read(path), {"a": finite.astype(dtype)})


def test_float16_loses_no_bit_on_the_way(tmp_path: Path) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite: Array = every[np.isfinite(every)]
    _, path = folded(tmp_path, {"a": np.zeros(len(finite), np.float16)}, [("one", 3, {"a": finite})], "state")
    assert same_bytes(tensors.read(path), {"a": finite})


def nearest_bfloat16(value: float) -> int:
    """Bits of the bfloat16 nearest to `value` >= 0, ties to even, by comparing fractions."""
    below = int(np.array(value, np.float32).view(np.uint32)) >> 16
    if Fraction(float(np.array(below << 16, np.uint32).view(np.float32))) > Fraction(value):
        below -= 1
    if Fraction(float(np.array(below << 16, np.uint32).view(np.float32))) == Fraction(value):
        return below  # the largest has no finite neighbour above
    low, high = (Fraction(float(np.array(bits << 16, np.uint32).view(np.float32))) for bits in (below, below + 1))
    to_low, to_high = Fraction(value) - low, high - Fraction(value)
    return below if to_low < to_high or (to_low == to_high and below % 2 == 0) else below + 1


@given(st.integers(0, 0x7F7E), st.floats(0, 1), st.sampled_from([-(2.0**-40), 0.0, 2.0**-40]))
def test_a_bfloat16_state_is_rounded_once(bits: int, between: float, nudge: float) -> None:
    low, high = (float(np.array(part << 16, np.uint32).view(np.float32)) for part in (bits, bits + 1))
    for value in (low + (high - low) * between, (low + high) / 2 + (high - low) * nudge):
        rounded = slabs.narrow(np.array([value, -value]), "BF16", memoryview(bytearray(4)))
        expected = nearest_bfloat16(value)
        assert np.frombuffer(rounded, np.uint16).tolist() == [expected, expected | 0x8000]


def test_a_state_that_overflows_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    for dtype in ("F32", "F16", "BF16"):
        folder = tmp_path / dtype
        folder.mkdir()
        top = np.array([65504.0 if dtype == "F16" else 3.38e38], tensors.DTYPES[dtype])
        with pytest.raises(NotFiniteError, match=dtype):
            folded(folder, {"a": top}, [("one", 1, {"a": top})])
        assert sorted(path.name for path in folder.iterdir()) == ["base", "update-one"]


def test_a_contribution_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(NotFiniteError):
            folded(tmp_path, {"a": np.zeros(2, np.float32)}, [("one", 1, {"a": np.array([0, bad], np.float32)})])


def test_nobody_s_tensors_keep_their_bytes(tmp_path: Path) -> None:
    base: dict[str, Array] = {"a": np.array([np.nan, 1], np.float32), "b": np.arange(3, dtype=np.int64), "c": np.zeros(2, np.float32)}
    result, path = folded(tmp_path, base, [("one", 1, {"c": np.ones(2, np.float32)})])
    assert same_bytes(tensors.read(path), {**base, "c": np.ones(2, np.float32)})
    assert result.coverage == {"a": 0, "b": 0, "c": 1}


def test_no_contributions_give_the_base(tmp_path: Path) -> None:
    result, path = folded(tmp_path, state_of(np.random.default_rng(0)), [])
    assert path.read_bytes() == (tmp_path / "base").read_bytes()
    assert result.update_norm == 0


@pytest.mark.parametrize(
    ("updates", "complaint"),
    [
        ([("one", 0, {"a": np.zeros(2, np.float32)})], "'one' has the weight 0"),
        ([("one", 1, {"a": np.zeros(2, np.float32)})] * 2, "'one' contributes twice"),
        ([("one", 2**53, {"a": np.zeros(2, np.float32)})], "less than 2"),
        ([("one", 1, {"x": np.zeros(2, np.float32)})], "device 'one': An update holds a tensor 'x'"),
        ([("one", 1, {"a": np.zeros(3, np.float32)})], r"'a' has the shape \[3\]; \[2\] is expected"),
        ([("one", 1, {"a": np.zeros(2, np.int64)})], "'a' came as I64 for F32"),
    ],
)
def test_an_unsound_plan_is_refused(tmp_path: Path, updates: list[Update], complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        folded(tmp_path, {"a": np.zeros(2, np.float32)}, updates)


def test_deltas_and_states_are_not_mixed(tmp_path: Path) -> None:
    one: Mapping[str, Array] = {"a": np.zeros(2, np.float32)}
    parts = (*contributed(tmp_path, [("one", 1, one)], "delta"), *contributed(tmp_path, [("two", 1, one)], "state"))
    with pytest.raises(WireError, match="all must be of one kind"):
        fold(FoldPlan(tensors.write(tmp_path / "base", one, {}), parts, tmp_path / "out"))


def test_a_base_in_another_order_keeps_its_order(tmp_path: Path) -> None:
    # As the safetensors library lays out mixed dtypes: wide ones first, not by name.
    header = codec.build_header([codec.TensorSpec("b", "F32", (2,), 0, 8), codec.TensorSpec("a", "F16", (2,), 8, 12)], {})
    base = tmp_path / "base"
    base.write_bytes(header + np.array([1, 2], np.float32).tobytes() + np.array([3, 4], np.float16).tobytes())
    parts = contributed(tmp_path, [("one", 1, {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)})])
    fold(FoldPlan(base, parts, tmp_path / "out"))
    assert codec.read_table(tmp_path / "out").specs == codec.read_table(base).specs
    assert same_bytes(tensors.read(tmp_path / "out"), {"a": np.array([4, 5], np.float16), "b": np.array([2, 3], np.float32)})


# --- Checking one update ------------------------------------------------------------------------------------------------------------


def expected_table(tmp_path: Path) -> codec.TensorTable:
    return codec.read_table(tensors.write(tmp_path / "expected", state_of(np.random.default_rng(0)), {}))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_sound_update_is_described(tmp_path: Path, dtype: str) -> None:
    arrays = state_of(np.random.default_rng(0), dtype, {"a.weight": (3, 5), "b.weight": (7,)})
    path = tensors.write(tmp_path / "update", arrays, {aggregate.KIND_KEY: "state"})
    facts = inspect(path, expected_table(tmp_path), slab_bytes=50)
    assert (facts.kind, facts.names, facts.dtype, facts.finite) == ("state", ("a.weight", "b.weight"), dtype, True)
    squares = sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays.values())
    assert facts.norm == pytest.approx(np.sqrt(squares), rel=1e-12)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_and_named(tmp_path: Path, dtype: str, bad: float) -> None:
    arrays = state_of(np.random.default_rng(0), dtype)
    arrays["c.weight"][1, 0, 1] = bad
    path = tensors.write(tmp_path / "update", arrays, {aggregate.KIND_KEY: "delta"})
    for slab_bytes in (1, 60, 1 << 20):
        with pytest.raises(WireError, match=f"'c.weight' holds {bad} at element 5 of 8"):
            inspect(path, expected_table(tmp_path), slab_bytes)


def test_the_largest_floats_are_finite(tmp_path: Path) -> None:
    top = np.full(7, np.finfo(np.float32).max)
    path = tensors.write(tmp_path / "update", {"b.weight": top}, {aggregate.KIND_KEY: "delta"})
    assert inspect(path, expected_table(tmp_path)).norm == pytest.approx(float(top[0]) * np.sqrt(7))


@pytest.mark.parametrize(
    ("arrays", "metadata", "complaint"),
    [
        ({"x": np.zeros(7, np.float32)}, "delta", "holds a tensor 'x'; the state has none"),
        ({"b.weight": np.zeros((7, 1), np.float32)}, "delta", r"'b.weight' has the shape \[7, 1\]; \[7\] is expected"),
        ({"b.weight": np.zeros(7, np.float64)}, "delta", "'b.weight' came as F64 for F32"),
        ({"a.weight": np.zeros((3, 5), np.float32), "b.weight": np.zeros(7, np.float16)}, "delta", "'b.weight' came as F16, others as F32"),
        ({"b.weight": np.zeros(7, np.float32)}, "", "is needed"),
        ({}, "delta", "holds no tensors"),
    ],
)
def test_an_unsound_update_is_refused(tmp_path: Path, arrays: Mapping[str, Array], metadata: str, complaint: str) -> None:
    path = tensors.write(tmp_path / "update", arrays, {aggregate.KIND_KEY: metadata})
    with pytest.raises(WireError, match=complaint):
        inspect(path, expected_table(tmp_path))


# --- Server optimisers --------------------------------------------------------------------------------------------------------------


def assert_close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=1e-6, atol=1e-7)


class Dense:
    """The optimisers as the papers write them, on whole arrays; moments are rounded to float32 between rounds."""

    def __init__(self, server: ServerOptimizer, base: Mapping[str, Array]) -> None:
        self.server = server
        self.m = {name: np.zeros(array.shape) for name, array in base.items()}
        self.v = {name: np.full(array.shape, np.float64(np.float32(getattr(server, "tau", 0.0) ** 2))) for name, array in base.items()}

    def step(self, name: str, delta: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        server, m, v = self.server, self.m[name], self.v[name]
        if isinstance(server, FedAvgM):
            m = server.momentum * m + delta
            self.m[name] = m.astype(np.float32).astype(np.float64)
            return server.learning_rate * m
        m = server.beta1 * m + (1 - server.beta1) * delta
        if isinstance(server, FedAdam):
            v = server.beta2 * v + (1 - server.beta2) * delta**2
        else:
            v = v - (1 - server.beta2) * delta**2 * np.sign(v - delta**2)
        self.m[name], self.v[name] = m.astype(np.float32).astype(np.float64), v.astype(np.float32).astype(np.float64)
        return server.learning_rate * m / (np.sqrt(v) + server.tau)


@pytest.mark.parametrize("kind", ["delta", "state"])
@pytest.mark.parametrize("server", [FedAvgM(0.7, 0.9), FedAdam(0.02, 0.9, 0.99, 1e-3), FedYogi(0.02, 0.9, 0.99, 1e-3)])
@pytest.mark.parametrize("slab_bytes", [64, 1 << 20])
def test_server_optimisers_follow_the_papers_over_several_rounds(
    tmp_path: Path, server: ServerOptimizer, kind: str, slab_bytes: int
) -> None:
    rng = np.random.default_rng(5)
    state = state_of(rng)
    dense = Dense(server, state)
    path, moments = tensors.write(tmp_path / "state-0", state, {"format": "pt"}), None
    for number in range(1, 5):
        # Each round leaves out another tensor: its weights and moments must rest.
        shapes = {name: shape for index, (name, shape) in enumerate(SHAPES.items()) if index != number % 3}
        updates: list[Update] = [(f"device-{index}", 10 + index, state_of(rng, "F32", shapes)) for index in range(3)]
        out, out_moments = tmp_path / f"state-{number}", tmp_path / f"moments-{number}"
        result = fold(FoldPlan(path, contributed(tmp_path, updates, kind), out, server, moments, out_moments, slab_bytes))
        for name in shapes:
            value, _ = mean(name, updates)
            assert value is not None
            old = state[name].astype(np.float64)
            state[name] = (old + dense.step(name, value if kind == "delta" else value - old)).astype(np.float32)
        path, moments = out, out_moments
        found = tensors.read(out)
        for name, array in state.items():
            assert_close(found[name], array)
        kept = tensors.read(out_moments)
        for name in SHAPES:
            assert_close(kept[name][..., 0], dense.m[name])
            if server.moments == 2:
                assert_close(kept[name][..., 1], dense.v[name])
        state = {name: found[name].copy() for name in state}
        assert result.optimizer_digest == blake3(out_moments.read_bytes()).hexdigest()
        assert result.optimizer_size_bytes == out_moments.stat().st_size


def test_momentum_zero_is_the_plain_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = state_of(rng)
    updates: list[Update] = [("one", 3, state_of(rng)), ("two", 4, state_of(rng))]
    plain, _ = folded(tmp_path, base, updates)
    parts = contributed(tmp_path, updates)
    server = fold(FoldPlan(tmp_path / "base", parts, tmp_path / "out2", FedAvgM(1.0, 0.0), None, tmp_path / "moments"))
    assert server.digest == plain.digest


def test_moments_of_another_optimiser_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = state_of(rng)
    parts = contributed(tmp_path, [("one", 3, state_of(rng))])
    tensors.write(tmp_path / "base", base, {})
    fold(FoldPlan(tmp_path / "base", parts, tmp_path / "out", FedAdam(), None, tmp_path / "moments"))
    with pytest.raises(WireError, match="does not hold the moments of fedyogi"):
        fold(FoldPlan(tmp_path / "base", parts, tmp_path / "out", FedYogi(), tmp_path / "moments", tmp_path / "moments-2"))


# --- Memory -------------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
from fleetune.coordinator.rounds.aggregate import Contribution, FoldPlan, fold
folder, count = Path(sys.argv[1]), int(sys.argv[2])
parts = tuple(Contribution(f"d{i:04}", folder / "update", 1 + i) for i in range(count))
def anonymous_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
fold(FoldPlan(folder / "small-base", (Contribution("d", folder / "small-update", 1),), folder / "small-out"))
before = anonymous_kib()
fold(FoldPlan(folder / "base", parts, folder / "out"))
print(anonymous_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from Linux's /proc")
def test_memory_grows_neither_with_the_state_nor_with_the_devices(tmp_path: Path) -> None:
    for prefix, length in (("small-", 8), ("", 16 << 20 >> 2)):
        arrays: Mapping[str, Array] = {f"layer.{index}": np.ones(length // 8, np.float32) for index in range(8)}
        tensors.write(tmp_path / f"{prefix}base", arrays, {})
        tensors.write(tmp_path / f"{prefix}update", arrays, {aggregate.KIND_KEY: "delta"})

    def grown_kib(devices: int) -> int:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(devices)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert grown_kib(4) < 3 << 10  # the state is 16 MiB
    assert grown_kib(100) < 3 << 10


def test_neighbouring_tensors_are_folded_as_one_span(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {f"layer.{index}": np.ones(3, np.float32) for index in range(9)}
    base = codec.read_table(tensors.write(tmp_path / "base", arrays, {}))
    every = codec.read_table(tensors.write(tmp_path / "every", arrays, {aggregate.KIND_KEY: "delta"}))
    arrays.pop("layer.4")
    without = codec.read_table(tensors.write(tmp_path / "without", arrays, {aggregate.KIND_KEY: "delta"}))
    assert [span.elements for span in contributions.spans(base, [every])] == [27]
    assert [span.elements for span in contributions.spans(base, [every, without])] == [12, 3, 12]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7F800000, 0xFFFFFFFF])
def test_every_kind_of_nan_is_refused_without_a_warning(tmp_path: Path, bits: int) -> None:
    path = tensors.write(tmp_path / "update", {"a": np.array([1.0, 2.0], np.float32)}, {aggregate.KIND_KEY: "delta"})
    expected = codec.read_table(path)
    path.write_bytes(path.read_bytes()[:-4] + bits.to_bytes(4, "little"))
    with pytest.raises(aggregate.NotFiniteUpdateError):
        inspect(path, expected)
