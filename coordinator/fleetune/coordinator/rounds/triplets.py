"""States of triplet adapters on disk: their ranks, what is left of one after a decision, and the same adapter as a plain LoRA.

A module's tensors are A (r x k), B (d x r) and E (r), named after it with `.lora_A`, `.lora_B` and `.lora_E`. Everything else in a state is
the head. PEFT knows only pairs, so that the values go into A: A' = diag(E) A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from fleetune.coordinator.rounds import slabs
from fleetune.errors import WireError
from fleetune.wire import codec
from fleetune.wire.codec import TensorSpec, TensorTable

PREFIX = "base_model.model."
NO_TARGETS = "dummy-target-modules"
"""PEFT's own word for an adapter without any; a list of none means all to it."""

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>[ABE])")
_AXES = {"A": 0, "B": 1, "E": 0}
_Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Written:
    """A finished file, durable."""

    digest: str
    size_bytes: int
    trainables_digest: str


def module_of(name: str) -> str:
    """The module that a tensor of a state is the adapter of, without PEFT's prefix; empty for a tensor of the head.

    >>> module_of("base_model.model.bert.layer.0.query.lora_E"), module_of("base_model.model.classifier.bias")
    ('bert.layer.0.query', '')
    """
    found = _PART.fullmatch(name)
    return found["module"].removeprefix(PREFIX) if found else ""


def ranks_of(table: TensorTable) -> dict[str, int]:
    """Module -> triplets, by name."""
    return {module_of(spec.name): spec.shape[0] for spec in table.specs if spec.name.endswith(".lora_E") and len(spec.shape) == 1}


def sliced(source: Path, out: Path, alive: Mapping[str, str]) -> Written:
    """Writes a state of the triplets that stay; a module without any is not in it. WireError where the places do not fit the state."""
    table = codec.read_table(source)
    ranks = ranks_of(table)
    if {module: len(mask) for module, mask in alive.items()} != ranks:
        raise WireError(
            "The decision of the round is of other triplets than its state has.", "This is a bug of the coordinator; report it."
        )
    kept = {module: [place for place, bit in enumerate(mask) if bit == "1"] for module, mask in alive.items()}

    def part(spec: TensorSpec) -> tuple[TensorSpec, list[int], int] | None:
        """A tensor's shape afterwards, and which places of which axis are taken; None where it goes."""
        places = kept.get(module_of(spec.name))
        if places is None:
            return spec, [], -1
        axis = _AXES[spec.name[-1]]
        shape = tuple(len(places) if index == axis else size for index, size in enumerate(spec.shape))
        return (codec.reshaped(spec, shape), places, axis) if places else None

    parts = {spec.name: found for spec in table.specs if (found := part(spec)) is not None}
    specs = codec.pack((name, spec.dtype, spec.shape) for name, (spec, _, _) in parts.items())

    def values(spec: TensorSpec) -> _Array:
        _, places, axis = parts[spec.name]
        whole = _tensor(source, table, spec.name)
        return whole if axis < 0 else np.take(whole, places, axis=axis)

    return _write(out, specs, table.metadata, (values(spec) for spec in specs))


def as_lora(source: Path, out: Path) -> Written:
    """Writes the adapter of a state under PEFT's names: E goes into A."""
    table = codec.read_table(source)
    names = {
        (f"{spec.name}.weight" if module_of(spec.name) else spec.name): spec for spec in table.specs if not spec.name.endswith(".lora_E")
    }
    specs = codec.pack((name, spec.dtype, spec.shape) for name, spec in names.items())

    def values(spec: TensorSpec) -> _Array:
        own = names[spec.name]
        found = _tensor(source, table, own.name)
        if not module_of(own.name) or not own.name.endswith(".lora_A"):
            return found
        factors = _tensor(source, table, own.name.removesuffix("A") + "E").astype(np.float64)
        return (factors[:, None] * found.astype(np.float64)).astype(found.dtype)

    return _write(out, specs, {"format": "pt"}, (values(spec) for spec in specs))


def config(text: str, ranks: Mapping[str, int], scale: float) -> str:
    """adapter_config.json of a round, from that of the job: PEFT multiplies by alpha / r, so that each module's alpha follows its rank."""
    found = cast("dict[str, object]", json.loads(text))
    found["target_modules"] = sorted(ranks) or NO_TARGETS
    found["rank_pattern"] = dict(sorted(ranks.items()))
    found["alpha_pattern"] = {module: scale * rank for module, rank in sorted(ranks.items())}
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def _tensor(path: Path, table: TensorTable, name: str) -> _Array:
    spec = table.by_name[name]
    with path.open("rb") as file:
        file.seek(table.data_start + spec.begin)
        raw = file.read(spec.size_bytes)
    if len(raw) != spec.size_bytes:
        raise WireError(f"A tensor file ends inside the tensor {name!r}.", "It was cut on disk.")
    dtype = slabs.FLOATS.get(spec.dtype)
    if dtype is None:
        raise WireError(f"Tensor {name!r} is {spec.dtype}; {', '.join(slabs.FLOATS)} are allowed.")
    return np.reshape(np.frombuffer(raw, dtype), spec.shape)


def _write(out: Path, specs: tuple[TensorSpec, ...], metadata: Mapping[str, str], values: Iterator[_Array]) -> Written:
    header = codec.build_header(specs, metadata)
    with slabs.Output(out) as file:
        file.write(header)
        for array in values:
            file.write(array.tobytes())
        file.make_durable()
        file.publish()
        table = TensorTable(specs, metadata, len(header), file.size_bytes)
        return Written(file.digest(), file.size_bytes, codec.trainables_digest(table))
