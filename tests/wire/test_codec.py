"""The tensor table reads what the safetensors library writes, writes what it reads, and refuses everything else at once."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load, save

from fleetune.errors import WireError
from fleetune.wire import codec

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name.isprintable() and name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
layouts = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6)
metadata = st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=20), max_size=3)


def file_of(header: bytes, data: bytes = b"") -> tuple[bytes, int]:
    raw = struct.pack("<Q", len(header)) + header
    return raw, len(raw) + len(data)


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(layouts, metadata)
def test_the_library_reads_our_header(layout: dict[str, tuple[str, tuple[int, ...]]], meta: dict[str, str]) -> None:
    specs = codec.pack((name, dtype, shape) for name, (dtype, shape) in layout.items())
    body = bytes(index % 2 for index in range(max((spec.end for spec in specs), default=0)))
    header = codec.build_header(specs, meta)
    assert len(header) % 8 == 0
    loaded = load(header + body)
    assert {name: (array.dtype, array.shape) for name, array in loaded.items()} == {
        name: (np.dtype(DTYPES[dtype]), shape) for name, (dtype, shape) in layout.items()
    }
    for spec in specs:
        assert loaded[spec.name].tobytes() == body[spec.begin : spec.end]


@given(layouts, metadata)
def test_we_read_the_library_s_header(layout: dict[str, tuple[str, tuple[int, ...]]], meta: dict[str, str]) -> None:
    arrays: dict[str, npt.NDArray[np.generic]] = {name: np.ones(shape, DTYPES[dtype]) for name, (dtype, shape) in layout.items()}
    raw = save(arrays, metadata=meta or None)
    table = codec.parse_header(raw, len(raw))
    assert {spec.name: (spec.dtype, spec.shape) for spec in table.specs} == layout
    assert list(table.names) == sorted(layout)
    assert table.metadata == meta
    for spec in table.specs:
        assert raw[table.data_start + spec.begin : table.data_start + spec.end] == arrays[spec.name].tobytes()


def test_bfloat16_has_two_bytes(tmp_path: Path) -> None:
    specs = codec.pack([("a", "BF16", (2, 3))])
    path = tmp_path / "a.safetensors"
    path.write_bytes(codec.build_header(specs, {"format": "pt"}) + bytes(12))
    with safe_open(path, framework="np") as file:
        assert file.get_slice("a").get_dtype() == "BF16"
    assert codec.read_table(path).specs == specs


def test_the_header_does_not_depend_on_the_order_of_its_parts() -> None:
    specs = codec.pack([("b", "F32", (2,)), ("a", "F32", (1,))])
    assert [spec.name for spec in specs] == ["a", "b"]
    assert codec.build_header(specs, {"x": "1", "a": "2"}) == codec.build_header(reversed(specs), {"a": "2", "x": "1"})


def test_trainables_digest_is_over_sorted_names_types_and_shapes() -> None:
    specs = codec.pack([("b", "F32", ()), ("a", "BF16", (2, 3))])
    raw = codec.build_header(specs, {"any": "thing"})
    table = codec.parse_header(raw, len(raw) + specs[-1].end)
    assert codec.trainables_digest(table) == blake3(b"a\tBF16\t2x3\nb\tF32\t\n").hexdigest()


BAD_ENTRIES = {
    "a negative offset": entry(offsets=(-4, 0)),
    "an end before the begin": entry(offsets=(4, 0)),
    "a size that is not the shape's": entry(shape=(2,)),
    "a shape that overflows": entry(shape=(2**62, 4)),
    "a huge shape": entry(shape=(999999999999999999, 999999999999999999)),
    "a number of 30 digits": entry(shape=(10**30,)),
    "a fraction": entry(shape=(1.0,)),
    "an exponent": entry(shape=(1e0,)),
    "a truth value": entry(shape=(True,)),
    "a truth value as an offset": entry(dtype="U8", offsets=(False, True)),
    "three offsets": entry(offsets=(0, 4, 4)),
    "no offsets": entry(offsets=()),
    "offsets as text": entry(offsets="04"),
    "nine dimensions": entry(shape=(1,) * 9),
    "an unknown dtype": entry(dtype="F8_E4M3"),
    "a dtype that is a list": entry(dtype=["F32"]),
    "a NaN": entry(shape=(float("nan"),)),
    "an infinity": entry(offsets=(0, float("inf"))),
    "one field more": {**entry(), "code": "x"},
    "one field less": {"dtype": "F32", "shape": (1,)},
    "a list": [1, 2],
    "nothing": None,
}


@pytest.mark.parametrize("bad", BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())
def test_a_bad_entry_is_refused(bad: object) -> None:
    raw, size = file_of(json.dumps({"a": bad}).encode(), bytes(4))
    with pytest.raises(WireError):
        codec.parse_header(raw, size)


BAD_HEADERS = {
    "no JSON": b"{nonsense",
    "a list": b"[]      ",
    "a number": b"12345678",
    "duplicate tensors": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "duplicate fields": b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "not UTF-8": b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "UTF-16": '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.encode("utf-16"),
    "a byte order mark": '\ufeff{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.encode(),
    "half a character in a name": b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "half a character in metadata": b'{"__metadata__":{"a":"\\ud800"}}',
    "a line break in a name": b'{"a\\nb":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "an empty name": b'{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "a long name": b'{"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' % (b"a" * 513),
    "metadata that is a list": b'{"__metadata__":[]}',
    "metadata that holds a number": b'{"__metadata__":{"a":1}}',
    "deep lists": b'{"a":' + b"[" * 500_000,
    "a deep shape": b'{"a":{"dtype":"U8","shape":[' + b"[" * 900 + b"]" * 900 + b'],"data_offsets":[0,0]}}',
    "a deep dtype": b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[],"data_offsets":[0,0]}}',
    "a long field name": b'{"a":{"%s":1}}' % (b"x" * 500_000),
    "a long dtype": b'{"a":{"dtype":"%s","shape":[],"data_offsets":[0,0]}}' % (b"x" * 500_000),
    "a long metadata name": b'{"__metadata__":{"%s":"x"}}' % (b"x" * 500_000),
    "deep objects": b'{"a":' * 100_000,
    "deep lists within the count of brackets": b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "many small lists": b'{"a":[' + b"[]," * 300_000 + b"[]]}",
    "many numbers": b'{"a":[' + b"1," * 500_000 + b"1]}",
    "a number of a million digits": b'{"a":' + b"1" * 1_000_000 + b"}",
    "a fraction of a million digits": b'{"a":1.' + b"1" * 1_000_000 + b"}",
    "too many tensors": json.dumps({f"{i}": entry("U8", (0,), (0, 0)) for i in range(4097)}).encode(),
    "300,000 tensors": json.dumps({f"{i}": entry("U8", (0,), (0, 0)) for i in range(300_000)}).encode(),
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_hostile_header_is_refused_within_bounded_memory(header: bytes) -> None:
    raw, size = file_of(header)
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as refused:
            codec.parse_header(raw, size)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 << 20
    assert len(refused.value.message) < 1000


def test_a_terabyte_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40) + b"{")
        file.truncate(1 << 40)
    with pytest.raises(WireError, match="1099511627776 bytes"):
        codec.read_table(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 20])
def test_a_cut_file_is_refused(tmp_path: Path, length: int) -> None:
    whole = codec.build_header(codec.pack([("a", "F32", (1,))]), {}) + bytes(4)
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:length])
    with pytest.raises(WireError):
        codec.read_table(path)


@pytest.mark.parametrize(
    ("offsets", "size", "complaint"),
    [
        (((0, 4), (2, 6)), 6, "overlaps"),
        (((0, 4), (0, 4)), 4, "overlaps"),
        (((0, 4), (5, 9)), 9, "gap"),
        (((1, 5), (5, 9)), 9, "gap"),
        (((0, 4), (4, 8)), 9, "8 bytes of tensors and holds 9"),
        (((0, 4), (4, 8)), 7, "8 bytes of tensors and holds 7"),
    ],
)
def test_tensors_must_cover_the_data_exactly(offsets: tuple[tuple[int, int], ...], size: int, complaint: str) -> None:
    header = json.dumps({str(index): entry("F32", (1,), part) for index, part in enumerate(offsets)}).encode()
    raw, file_size = file_of(header, bytes(size))
    with pytest.raises(WireError, match=complaint):
        codec.parse_header(raw, file_size)


def test_we_do_not_write_what_we_would_not_read() -> None:
    with pytest.raises(WireError, match="gap"):
        codec.build_header([codec.TensorSpec("a", "U8", (1,), 1, 2)], {})
    with pytest.raises(WireError, match="listed twice"):
        codec.build_header([codec.TensorSpec("a", "U8", (0,), 0, 0)] * 2, {})
    with pytest.raises(WireError, match="UTF-8"):
        codec.build_header(codec.pack([("\ud800", "U8", (1,))]), {})


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_are_a_table_or_a_wire_error(raw: bytes, size: int) -> None:
    try:
        codec.parse_header(raw, size)
    except WireError:
        return


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_byte_in_the_header_is_a_table_or_a_wire_error(data: st.DataObject) -> None:
    raw = bytearray(codec.build_header(codec.pack([("a.b", "F32", (2, 2)), ("c", "I8", (3,))]), {"format": "pt"}))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.parse_header(bytes(raw), len(raw) + 19)
    except WireError:
        return


@pytest.mark.parametrize("shape", [(10**17, 10**17, 0), (0, 10**17, 10**17)])
def test_a_shape_that_overflows_beside_a_zero_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="no array"):
        codec.pack([("x", "F32", shape)])
