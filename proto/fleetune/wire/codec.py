"""The header of a tensor file (safetensors): read with hard bounds, written in one canonical form, without numpy.

The safetensors library accepts duplicate keys, hundreds of thousands of tensors and headers of 100 MB; a header from the network
passes here first. Layout of a file: 8 bytes little-endian length of the header, the header (JSON, padded with spaces to a multiple of 8),
the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn, cast

from fleetune.errors import WireError
from fleetune.wire import digests

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
MAX_NAME_CHARS = 512
MAX_DIMENSIONS = 8
# Python objects that a header may make the parser build; a full header of MAX_TENSORS needs 3 brackets and about 12 commas a tensor.
_MAX_BRACKETS = 4 * MAX_TENSORS
_MAX_COMMAS = 16 * MAX_TENSORS
_MAX_DIGITS = 18  # below 2**63
_OVERFLOW = 2**63
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

# Bytes of one element.
ITEM_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: `begin` and `end` are byte offsets from the start of the data region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return self.size_bytes // ITEM_BYTES[self.dtype]


def reshaped(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    """The same tensor in another shape; for comparison alone, since its end is not a place in the file."""
    return replace(spec, shape=shape, end=spec.begin + math.prod(shape) * ITEM_BYTES[spec.dtype])


@dataclass(frozen=True)
class TensorTable:
    """What a tensor file holds: specs sorted by name, and where the data region starts in the file."""

    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(hash=False)
    data_start: int
    file_size: int

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for spec in self.specs}

    @cached_property
    def in_file_order(self) -> tuple[TensorSpec, ...]:
        return tuple(sorted(self.specs, key=lambda spec: (spec.begin, spec.end)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)


def read_table(path: Path) -> TensorTable:
    """Table of a tensor file. WireError where the file is not a sound tensor file; OSError where it cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return parse_header(read_header(fd), os.fstat(fd).st_size)
    finally:
        os.close(fd)


def read_header(fd: int) -> bytes:
    """The length and the header of an open tensor file, as `parse_header` takes them; reads at most MAX_HEADER_BYTES."""
    prefix = os.pread(fd, _LENGTH_BYTES, 0)
    header_bytes = _header_length(prefix)
    return prefix + os.pread(fd, header_bytes, _LENGTH_BYTES)


def parse_header(raw: bytes, file_size: int) -> TensorTable:
    """Table from the beginning of a file (length and header; more does no harm) whose whole size is `file_size` bytes."""
    data_start = _LENGTH_BYTES + _header_length(raw[:_LENGTH_BYTES])
    if len(raw) < data_start or file_size < data_start:
        raise WireError(f"A tensor file ends inside its header: {min(len(raw), file_size)} of {data_start} bytes.")
    metadata: Mapping[str, str] = {}
    specs: list[TensorSpec] = []
    for name, entry in _load(raw[_LENGTH_BYTES:data_start]).items():
        if name == _METADATA:
            metadata = _metadata(entry)
        else:
            specs.append(_spec(name, entry))
    if len(specs) > MAX_TENSORS:
        raise WireError(f"A tensor file declares {len(specs)} tensors; at most {MAX_TENSORS} are allowed.")
    specs.sort(key=lambda spec: spec.name)
    table = TensorTable(tuple(specs), metadata, data_start, file_size)
    _check_packing(table)
    return table


def pack(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Specs of (name, dtype, shape) triples laid out without gaps in name order."""
    specs: list[TensorSpec] = []
    begin = 0
    for name, dtype, shape in sorted(tensors):
        end = begin + _size_bytes(name, dtype, shape)
        specs.append(TensorSpec(name, dtype, tuple(shape), begin, end))
        begin = end
    return tuple(specs)


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and header in canonical form: metadata first, names sorted, padded to 8 bytes. WireError for what could not be read back."""
    specs = sorted(specs, key=lambda spec: spec.name)
    entries: dict[str, object] = {}
    if metadata:
        entries[_METADATA] = dict(sorted(metadata.items()))
    for spec in specs:
        if spec.name in entries:
            raise WireError(f"Tensor {spec.name!r} is listed twice.")
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [spec.begin, spec.end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    # What we write we must be able to read: one set of rules, in the parser.
    parse_header(raw, len(raw) + max((spec.end for spec in specs), default=0))
    return raw


def trainables_digest(table: TensorTable) -> str:
    """Digest over names, dtypes and shapes alone: two sides that agree on it train the same tensors."""
    running = digests.running()
    for spec in table.specs:
        running.update(f"{spec.name}\t{spec.dtype}\t{'x'.join(map(str, spec.shape))}\n".encode())
    return running.hexdigest()


def _header_length(prefix: bytes) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise WireError(f"A tensor file of {len(prefix)} bytes is too short to hold a header.")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise WireError(f"A tensor file declares a header of {length} bytes; 2 to {MAX_HEADER_BYTES} are allowed.")
    return length


def _load(text: bytes) -> dict[str, object]:
    """The JSON object, with everything refused that could cost memory, time or a second reading of the same bytes."""
    if not text.startswith(b"{"):
        raise WireError("A tensor file's header is not a JSON object.")
    if text.count(b"[") + text.count(b"{") > _MAX_BRACKETS or text.count(b",") > _MAX_COMMAS:
        raise WireError(f"A tensor file's header lists more than {MAX_TENSORS} tensors' worth of values.")
    try:
        # The library's decoder would guess UTF-16 and UTF-32 from bytes; the format is UTF-8.
        loaded: object = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_whole, parse_float=_no_number, parse_constant=_no_number
        )
    except RecursionError:
        raise WireError("A tensor file's header is nested too deeply; three levels are allowed.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise WireError(f"A tensor file's header is not UTF-8 JSON: {str(error)[:200]}.") from None
    # object_pairs_hook makes a dict of every object, and the text starts with one.
    return cast("dict[str, object]", loaded)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WireError("A tensor file's header names the same key twice.")
    return found


def _whole(digits: str) -> int:
    if digits.startswith("-") or len(digits) > _MAX_DIGITS:
        raise WireError(f"A tensor file's header holds the number {digits[:24]}; whole numbers from 0 to {_MAX_DIGITS} digits are allowed.")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise WireError(f"A tensor file's header holds the number {text[:24]}; only whole numbers are allowed.")


def _metadata(entry: object) -> Mapping[str, str]:
    if not isinstance(entry, dict):
        raise WireError(f"A tensor file's {_METADATA} is {type(entry).__name__}; an object of strings is needed.")
    found: dict[str, str] = {}
    for key, value in cast("dict[str, object]", entry).items():
        if not isinstance(value, str) or len(key) > MAX_NAME_CHARS or not key.isprintable():
            raise WireError(f"A tensor file's {_METADATA} entry {key[:80]!r} is not a string under a printable name.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise WireError(f"A tensor file's {_METADATA} entry {key!r} holds half a character.") from None
        found[key] = value
    return found


def _spec(name: str, entry: object) -> TensorSpec:
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise WireError(f"A tensor's name {name[:80]!r} is not 1 to {MAX_NAME_CHARS} printable characters.")
    if not isinstance(entry, dict):
        raise WireError(f"Tensor {name!r} is declared as {type(entry).__name__}; an object is needed.")
    fields = cast("dict[str, object]", entry)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"Tensor {name!r} declares {[key[:40] for key in sorted(fields)[:8]]}; dtype, shape and data_offsets are needed.")
    dtype = fields["dtype"]
    shape = _numbers(name, "shape", fields["shape"], MAX_DIMENSIONS)
    offsets = _numbers(name, "data_offsets", fields["data_offsets"], 2)
    if not isinstance(dtype, str):
        raise WireError(f"Tensor {name!r} has the dtype {_shown(dtype)}; allowed are {', '.join(ITEM_BYTES)}.")
    if len(offsets) != 2 or offsets[1] - offsets[0] != _size_bytes(name, dtype, shape):
        raise WireError(f"Tensor {name!r} of {dtype} {list(shape)} cannot lie at the byte offsets {list(offsets)}.")
    return TensorSpec(name, dtype, shape, offsets[0], offsets[1])


def _numbers(name: str, what: str, entry: object, at_most: int) -> tuple[int, ...]:
    if not isinstance(entry, list):
        raise WireError(f"Tensor {name!r} has a {what} that is {type(entry).__name__}; a list of whole numbers is needed.")
    numbers = cast("list[object]", entry)
    if len(numbers) > at_most:
        raise WireError(f"Tensor {name!r} has a {what} of {len(numbers)} numbers; at most {at_most} are allowed.")
    for number in numbers:
        if type(number) is not int:  # bool is an int, too
            raise WireError(f"Tensor {name!r} has {_shown(number)} in its {what}; only whole numbers are allowed.")
    return tuple(cast("list[int]", numbers))


def _shown(value: object) -> str:
    """A value for a message; never the text of a structure, which may be deep or long."""
    return (
        repr(value[:40]) if isinstance(value, str) else str(value) if isinstance(value, (bool, int, type(None))) else type(value).__name__
    )


def _size_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    elements = size = ITEM_BYTES.get(dtype, 0)
    if not size:
        raise WireError(f"Tensor {name!r} has the dtype {dtype[:40]!r}; allowed are {', '.join(ITEM_BYTES)}.")
    for length in shape:
        # Also beside a 0, which would hide it: readers multiply in numbers of 64 bits.
        elements *= max(1, length)
        size *= length
    if elements >= _OVERFLOW:
        raise WireError(f"Tensor {name!r} has the shape {list(shape)}, which no array can have.")
    return size


def _check_packing(table: TensorTable) -> None:
    """Tensors must cover the data region exactly: no overlap, no gap, nothing after the last."""
    cursor = 0
    for spec in table.in_file_order:
        if spec.begin != cursor:
            what = "overlaps another" if spec.begin < cursor else "leaves a gap before it"
            raise WireError(f"Tensor {spec.name!r} begins at byte {spec.begin} and {what}; byte {cursor} is expected.")
        cursor = spec.end
    held = table.file_size - table.data_start
    if cursor != held:
        raise WireError(f"A tensor file declares {cursor} bytes of tensors and holds {held}.")
