"""A thousand updates that are wrong in ways drawn at random: none gets past the check, and what is merely odd does no harm."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fleetune.coordinator.rounds import aggregate
from fleetune.errors import WireError
from fleetune.wire import codec
from support import tensors
from support.tensors import Array

SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "c.weight": (2, 2, 2)}
SEEDS = range(10)
OF_EACH_SEED = 100
META = {aggregate.KIND_KEY: "delta"}

WORDS = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def encode(arrays: dict[str, Array], metadata: dict[str, str]) -> bytes:
    """A tensor file made by hand: our own writer refuses some of what is wanted here."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name in sorted(arrays):
        begin, data = len(data), data + arrays[name].tobytes()
        header[name] = {"dtype": WORDS[arrays[name].dtype.name], "shape": list(arrays[name].shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


Spoil = Callable[[random.Random, dict[str, Array]], "bytes | None"]
"""Changes the tensors, or gives the whole file."""


def not_finite(draw: random.Random, arrays: dict[str, Array]) -> None:
    name = draw.choice(list(arrays))
    flat = arrays[name].reshape(-1)
    flat[draw.randrange(flat.size)] = draw.choice([np.nan, np.inf, -np.inf])


def other_name(draw: random.Random, arrays: dict[str, Array]) -> None:
    name = draw.choice(list(arrays))
    arrays[draw.choice([name + "x", name[1:], "../" + name, name.upper(), "evil"])] = arrays.pop(name)


def one_more(draw: random.Random, arrays: dict[str, Array]) -> None:
    arrays[f"z{draw.randrange(99)}.weight"] = np.zeros(draw.randrange(1, 9), np.float32)


def other_shape(draw: random.Random, arrays: dict[str, Array]) -> None:
    name = draw.choice(list(arrays))
    old = arrays[name]
    arrays[name] = draw.choice([old.reshape(-1)[:-1].copy(), old.reshape(1, *old.shape), np.zeros((*old.shape, 2), np.float32)])


def other_type(draw: random.Random, arrays: dict[str, Array]) -> None:
    name = draw.choice(list(arrays))
    arrays[name] = arrays[name].astype(draw.choice([np.float64, np.int32, np.int64, np.int8, np.uint8, np.bool_]))


def cut(draw: random.Random, arrays: dict[str, Array]) -> bytes:
    data = encode(arrays, META)
    return data[: draw.randrange(len(data))]


def longer(draw: random.Random, arrays: dict[str, Array]) -> bytes:
    return encode(arrays, META) + draw.randbytes(draw.randrange(1, 99))


def noise(draw: random.Random, arrays: dict[str, Array]) -> bytes:
    return draw.randbytes(draw.randrange(1, 999))


def another_kind(draw: random.Random, arrays: dict[str, Array]) -> bytes:
    return encode(arrays, draw.choice([{}, {aggregate.KIND_KEY: "sideways"}, {aggregate.KIND_KEY: ""}, {"kind": "delta"}]))


WAYS: tuple[Spoil, ...] = (not_finite, other_name, one_more, other_shape, other_type, cut, longer, noise, another_kind)


def sound(draw: random.Random) -> dict[str, Array]:
    rng = np.random.default_rng(draw.randrange(2**32))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def table(folder: Path) -> codec.TensorTable:
    return codec.read_table(tensors.write(folder / "state", sound(random.Random(0)), {"format": "pt"}))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_update_that_is_wrong_is_taken(tmp_path: Path, seed: int) -> None:
    draw, expected, place = random.Random(seed), table(tmp_path), tmp_path / "update"
    for number in range(OF_EACH_SEED):
        arrays, way = sound(draw), draw.choice(WAYS)
        whole = way(draw, arrays)
        place.write_bytes(encode(arrays, META) if whole is None else whole)
        try:
            found = aggregate.inspect(place, expected)
        except (WireError, aggregate.NotFiniteUpdateError):
            continue
        pytest.fail(f"seed {seed}, update {number}, {way.__name__}: taken as {found}")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_update_unspoilt_is_taken(tmp_path: Path, seed: int) -> None:
    (tmp_path / "update").write_bytes(encode(sound(random.Random(seed)), META))
    assert aggregate.inspect(tmp_path / "update", table(tmp_path)).names == tuple(SHAPES)


def test_a_flood_of_subnormal_numbers_is_an_update_like_any_other(tmp_path: Path) -> None:
    tiny = {name: np.full(shape, 1e-42, np.float32) for name, shape in SHAPES.items()}
    place = tensors.write(tmp_path / "update", tiny, META)
    facts = aggregate.inspect(place, table(tmp_path))
    assert 0.0 <= facts.norm < 1e-40
