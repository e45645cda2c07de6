"""A fold of gradients is one step of torch's AdamW on their mean, tensor by tensor, whatever was skipped before."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from fleetune.coordinator.rounds.aggregate import KIND_KEY, Contribution, FoldPlan, FoldResult, fold
from fleetune.coordinator.rounds.moments import STEPS_KEY
from fleetune.coordinator.rounds.optimizers import AdamW, FedAdam
from fleetune.errors import ConfigError, NotFiniteError, WireError
from fleetune.wire import codec
from support import tensors
from support.tensors import Array

SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "c.weight": (2, 2, 2), "d.empty": (0, 4), "e.scalar": ()}
BLOCKS = (("e.scalar", "d.empty"), ("c.weight",), ("a.weight", "b.weight"))
Update = tuple[str, int, Mapping[str, Array]]


def drawn(rng: np.random.Generator, names: Sequence[str] = tuple(SHAPES), scale: float = 1.0) -> dict[str, Array]:
    return {name: (rng.standard_normal(SHAPES[name]) * scale).astype(np.float32) for name in names}


def contributed(folder: Path, updates: Sequence[Update]) -> tuple[Contribution, ...]:
    return tuple(
        Contribution(device, tensors.write(folder / f"update-{device}", arrays, {KIND_KEY: "gradient"}), weight)
        for device, weight, arrays in updates
    )


def stepped(
    folder: Path, state: Path, updates: Sequence[Update], server: AdamW, before: Path | None, number: int, slab_bytes: int = 1 << 20
) -> tuple[FoldResult, Path, Path]:
    out, moments = folder / f"state-{number}", folder / f"moments-{number}"
    return fold(FoldPlan(state, contributed(folder, updates), out, server, before, moments, slab_bytes)), out, moments


def steps_in(moments: Path) -> dict[str, int]:
    table = codec.read_table(moments)
    return dict(zip(table.names, map(int, table.metadata[STEPS_KEY].split(",")), strict=True))


def mean(name: str, updates: Sequence[Update]) -> Array | None:
    held = [(weight, arrays[name].astype(np.float64)) for _, weight, arrays in updates if name in arrays]
    if not held:
        return None
    total: Array = np.sum([weight * array for weight, array in held], axis=0) / sum(weight for weight, _ in held)
    return total


def assert_close(found: Array, expected: Array, rtol: float = 1e-6, about: str = "") -> None:
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=1e-6, err_msg=about)


@pytest.mark.parametrize("slab_bytes", [64, 1 << 20])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e6])
def test_many_steps_with_skipped_blocks_are_those_of_torch(tmp_path: Path, max_grad_norm: float, slab_bytes: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    state = drawn(rng)
    parameters = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in state.items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1.0, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.1)
    path, moments = tensors.write(tmp_path / "state", state, {"format": "pt"}), None
    for number in range(1, 31):
        # Each round leaves out another block, one round in five all but one; two devices or one train a block.
        trained = [block for index, block in enumerate(BLOCKS) if (index == 0 if number % 5 == 0 else index != number % 4)]
        updates: list[Update] = [
            (f"device-{index}-{copy}", 10 + index + copy, drawn(rng, block, 3.0 if number % 2 else 0.1))
            for index, block in enumerate(trained)
            for copy in range(1 + (number + index) % 2)
        ]
        rate = 0.01 / number
        server = AdamW(rate, 0.8, 0.99, 1e-8, 0.1, max_grad_norm)
        result, path, moments = stepped(tmp_path, path, updates, server, moments, number, slab_bytes)
        for name, parameter in parameters.items():
            gradient = mean(name, updates)
            parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float32)
        present = [parameter for parameter in parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(present, max_grad_norm or float("inf"))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert result.update_norm == pytest.approx(float(norm), rel=1e-6)
        found = tensors.read(path)
        for name, parameter in parameters.items():
            assert_close(found[name], parameter.detach().numpy(), about=f"{name}, round {number}")
        assert result.digest == blake3(path.read_bytes()).hexdigest()
        assert result.optimizer_digest == blake3(moments.read_bytes()).hexdigest()
    assert moments is not None
    kept, counts = tensors.read(moments), steps_in(moments)
    for name, parameter in parameters.items():
        of_torch = optimizer.state[parameter]
        assert counts[name] == int(of_torch["step"])
        assert_close(kept[name][..., 0], of_torch["exp_avg"].numpy(), 1e-5)
        assert_close(kept[name][..., 1], of_torch["exp_avg_sq"].numpy(), 1e-5)


def test_a_skipped_block_keeps_its_bytes_its_moments_and_its_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    state, server = drawn(rng), AdamW(0.1, weight_decay=0.5)
    path, before = tensors.write(tmp_path / "state", state, {}), None
    _, path, before = stepped(tmp_path, path, [("one", 1, drawn(rng))], server, before, 1)
    result, after, moments = stepped(tmp_path, path, [("one", 1, drawn(rng, ["b.weight"]))], server, before, 2)
    assert result.coverage == {"a.weight": 0, "b.weight": 1, "c.weight": 0, "d.empty": 0, "e.scalar": 0}
    assert steps_in(moments) == {name: 1 + (name == "b.weight") for name in SHAPES}
    for name in SHAPES:
        same = name != "b.weight" or not SHAPES[name]
        assert (tensors.read(after)[name].tobytes() == tensors.read(path)[name].tobytes()) is same
        assert (tensors.read(moments)[name].tobytes() == tensors.read(before)[name].tobytes()) is same


def test_a_block_s_first_step_is_bias_corrected_as_a_first_step_also_in_a_later_round(tmp_path: Path) -> None:
    server = AdamW(0.125, epsilon=1e-12)
    one = np.ones(4, np.float32)
    path, before = tensors.write(tmp_path / "state", {"a": one, "b": one}, {}), None
    for number in range(1, 4):
        _, path, before = stepped(tmp_path, path, [("d", 1, {"a": one * number})], server, before, number)
    _, path, before = stepped(tmp_path, path, [("d", 1, {"b": one * 5})], server, before, 4)
    # A first step is as long as the rate, whatever the gradient.
    assert_close(tensors.read(path)["b"], one - 0.125)
    assert steps_in(before) == {"a": 3, "b": 1}


def test_every_order_and_slab_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    state = drawn(rng)
    updates: list[Update] = [(f"device-{index}", 1 + index * 7919, drawn(rng, BLOCKS[index % 3], 1e3)) for index in range(9)]
    server = AdamW(0.01, weight_decay=0.1, max_grad_norm=1.0)
    found = set()
    for seed in range(6):
        random.Random(seed).shuffle(updates)
        folder = tmp_path / str(seed)
        folder.mkdir()
        result, _, _ = stepped(folder, tensors.write(folder / "state", state, {}), updates, server, None, 1)
        found.add((result.digest, result.optimizer_digest))
    assert len(found) == 1


def test_blocks_put_together_are_clipped_as_one_gradient(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    state, whole = drawn(rng), drawn(rng, scale=10.0)
    server = AdamW(0.01, max_grad_norm=1.0)
    path = tensors.write(tmp_path / "state", state, {})
    together, _, _ = stepped(tmp_path, path, [("one", 3, whole)], server, None, 1)
    parts: list[Update] = [(f"d{index}", 3, {name: whole[name] for name in block}) for index, block in enumerate(BLOCKS)]
    apart, _, _ = stepped(tmp_path, path, parts, server, None, 2)
    assert apart.update_norm == pytest.approx(together.update_norm, rel=1e-14)
    first, second = tensors.read(tmp_path / "state-1"), tensors.read(tmp_path / "state-2")
    assert all(first[name].tobytes() == second[name].tobytes() for name in SHAPES)


def test_no_gradient_at_all_leaves_everything(tmp_path: Path) -> None:
    path = tensors.write(tmp_path / "state", drawn(np.random.default_rng(0)), {})
    result, out, moments = stepped(tmp_path, path, [], AdamW(0.1, weight_decay=0.5), None, 1)
    assert out.read_bytes() == path.read_bytes()
    assert result.update_norm == 0
    assert set(steps_in(moments).values()) == {0}


def test_whole_numbers_of_the_state_are_left_alone(tmp_path: Path) -> None:
    state: dict[str, Array] = {"a": np.ones(3, np.float32), "b": np.arange(3, dtype=np.int64), "c": np.ones(2, np.float32)}
    path = tensors.write(tmp_path / "state", state, {})
    _, out, moments = stepped(tmp_path, path, [("d", 1, {"a": np.ones(3, np.float32), "c": np.ones(2, np.float32)})], AdamW(0.5), None, 1)
    assert tensors.read(out)["b"].tolist() == [0, 1, 2]
    assert steps_in(moments) == {"a": 1, "c": 1}


def test_gradients_without_an_optimiser_and_deltas_with_this_one_are_refused(tmp_path: Path) -> None:
    path = tensors.write(tmp_path / "state", {"a": np.ones(2, np.float32)}, {})
    gradients = contributed(tmp_path, [("d", 1, {"a": np.ones(2, np.float32)})])
    delta = Contribution("d", tensors.write(tmp_path / "delta", {"a": np.ones(2, np.float32)}, {KIND_KEY: "delta"}), 1)
    with pytest.raises(WireError, match="hold gradients"):
        fold(FoldPlan(path, gradients, tmp_path / "out"))
    with pytest.raises(WireError, match="hold gradients"):
        fold(FoldPlan(path, gradients, tmp_path / "out", FedAdam(), None, tmp_path / "moments"))
    with pytest.raises(WireError, match="hold deltas"):
        fold(FoldPlan(path, (delta,), tmp_path / "out", AdamW(0.1), None, tmp_path / "moments"))
    two = (Contribution("e", delta.path, 1), *gradients)
    with pytest.raises(WireError, match="delta and gradient"):
        fold(FoldPlan(path, two, tmp_path / "out", AdamW(0.1), None, tmp_path / "moments"))


@pytest.mark.parametrize("steps", ["", "1,1", "x", "1000000000000", "-1"])
def test_moments_whose_counts_make_no_sense_are_refused(tmp_path: Path, steps: str) -> None:
    state = {"a": np.ones(2, np.float32)}
    path = tensors.write(tmp_path / "state", state, {})
    before = tensors.write(tmp_path / "before", {"a": np.zeros((2, 2), np.float32)}, {"fleetune.optimizer": "adamw", STEPS_KEY: steps})
    with pytest.raises(WireError, match="does not hold the moments of adamw"):
        stepped(tmp_path, path, [("d", 1, state)], AdamW(0.1), before, 1)


def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tensors.write(tmp_path / "state", {"a": np.ones(2, np.float32)}, {})
    for limit in (0.0, 1.0):
        with pytest.raises(NotFiniteError):
            stepped(tmp_path, path, [("d", 1, {"a": np.array([1, np.nan], np.float32)})], AdamW(0.1, max_grad_norm=limit), None, 1)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["state", "update-d"]


@pytest.mark.parametrize("settings", [{"learning_rate": -1.0}, {"beta1": 1.0}, {"epsilon": 0.0}, {"max_grad_norm": float("nan")}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        AdamW(**{"learning_rate": 0.1, **settings})


PROGRAM = """
import sys
from pathlib import Path
from fleetune.coordinator.rounds.aggregate import Contribution, FoldPlan, fold
from fleetune.coordinator.rounds.optimizers import AdamW
folder, count = Path(sys.argv[1]), int(sys.argv[2])
server = AdamW(0.01, max_grad_norm=1.0)
parts = tuple(Contribution(f"d{i:04}", folder / "update", 1 + i) for i in range(count))
def anonymous_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
small = (Contribution("d", folder / "small-update", 1),)
fold(FoldPlan(folder / "small-base", small, folder / "small-out", server, None, folder / "small-moments"))
before = anonymous_kib()
fold(FoldPlan(folder / "base", parts, folder / "out", server, None, folder / "moments"))
print(anonymous_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from Linux's /proc")
def test_memory_grows_neither_with_the_state_nor_with_the_devices(tmp_path: Path) -> None:
    for prefix, length in (("small-", 8), ("", 8 << 20 >> 2)):
        arrays: Mapping[str, Array] = {f"layer.{index}": np.ones(length // 8, np.float32) for index in range(8)}
        tensors.write(tmp_path / f"{prefix}base", arrays, {})
        tensors.write(tmp_path / f"{prefix}update", arrays, {KIND_KEY: "gradient"})

    def grown_kib(devices: int) -> int:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(devices)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert grown_kib(4) < 3 << 10  # state and moments are 24 MiB
    assert grown_kib(80) < 3 << 10
