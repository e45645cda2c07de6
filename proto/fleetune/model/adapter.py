"""The adapter on disk: its tensors in PEFT's own names and its configuration, so that any PEFT user can load the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

from fleetune.errors import ModelError
from fleetune.model.lora import ADAPTER, AdaptedModel
from fleetune.model.recipe import Recipe
from fleetune.wire import codec, digests

STATE_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

DTYPE_WORDS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_DTYPES = {word: dtype for dtype, word in DTYPE_WORDS.items()}


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: lower-case hex BLAKE3 and size in bytes."""

    path: Path
    digest: str
    size_bytes: int


def write_state(path: Path, adapted: AdaptedModel) -> WrittenFile:
    """The whole trained state, as PEFT saves it: sorted names, metadata format=pt."""
    return write_tensors(path, {trainable.name: trainable.parameter.detach() for trainable in adapted.trainables}, {"format": "pt"})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], durable: bool = True) -> WrittenFile:
    """A tensor file in canonical form: names sorted, data packed in that order. Written aside, synced if `durable`, renamed."""
    specs = codec.pack((name, DTYPE_WORDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())
    header = codec.build_header(specs, metadata)
    return write_blocks(path, _blocks(header, (tensors[spec.name] for spec in specs)), durable)


def _blocks(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        # A tensor moved to the CPU is kept alive by this frame until its bytes are written.
        held = tensor.detach().to("cpu").contiguous()
        if held.numel():
            # numpy has no bfloat16; bytes are bytes.
            yield held.reshape(-1).view(torch.uint8).numpy().data


def write_blocks(path: Path, blocks: Iterable[bytes | memoryview], durable: bool = True) -> WrittenFile:
    """Writes the blocks beside `path`, syncs if `durable`, and renames; the digest is taken on the way."""
    aside = path.with_name(f".{path.name}.part")
    running = digests.running()
    size_bytes = 0
    try:
        with open(aside, "wb") as file:
            for block in blocks:
                file.write(block)
                running.update(block)
                size_bytes += len(block)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return WrittenFile(path, running.hexdigest(), size_bytes)


def load_state(adapted: AdaptedModel, path: Path, trainables_digest: str = "") -> None:
    """Sets every trained tensor from a state file, in place.

    Raises ModelError when a tensor is missing, unexpected, or of another shape or type; nothing is changed then.
    """
    tensors = read_state(path, {trainable.name: trainable.parameter for trainable in adapted.trainables}, trainables_digest)
    with torch.no_grad():
        for trainable in adapted.trainables:
            trainable.parameter.copy_(tensors[trainable.name])


def read_state(path: Path, expected: Mapping[str, torch.Tensor], trainables_digest: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a state file, on the CPU. ModelError unless they are those that are `expected`, by name, shape and type."""
    table = codec.read_table(path)
    _check_names(table, expected)
    if trainables_digest and codec.trainables_digest(table) != trainables_digest:
        raise ModelError(
            f"The state has the trainables digest {codec.trainables_digest(table)[:12]}, the task expects {trainables_digest[:12]}.",
            "The coordinator sent a state of another job; report this.",
        )
    return read_tensors(path, table)


def read_tensors(path: Path, table: codec.TensorTable) -> dict[str, torch.Tensor]:
    """Tensors of a file by name, on the CPU. The header was parsed with bounds; the data are plain numbers."""
    found: dict[str, torch.Tensor] = {}
    with open(path, "rb") as file:
        for spec in table.specs:
            file.seek(table.data_start + spec.begin)
            held = bytearray(spec.size_bytes)
            if file.readinto(held) != spec.size_bytes:
                raise ModelError(f"The tensor file {str(path)!r} ends inside the tensor {spec.name!r}.", "Fetch it again.")
            dtype = _DTYPES.get(spec.dtype)
            if dtype is None:
                raise ModelError(
                    f"Tensor {spec.name!r} is {spec.dtype}; a state holds {', '.join(_DTYPES)}.",
                    "Use an adapter of floating-point tensors.",
                )
            found[spec.name] = torch.frombuffer(held, dtype=dtype).reshape(spec.shape) if held else torch.empty(spec.shape, dtype=dtype)
    return found


def _check_names(table: codec.TensorTable, expected: Mapping[str, torch.Tensor]) -> None:
    complaints: list[str] = []
    missing = sorted(expected.keys() - table.by_name.keys())
    unexpected = sorted(table.by_name.keys() - expected.keys())
    if missing:
        complaints.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if unexpected:
        complaints.append(f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})")
    for name in sorted(expected.keys() & table.by_name.keys()):
        spec, parameter = table.by_name[name], expected[name]
        if spec.shape != tuple(parameter.shape):
            complaints.append(f"{name} has the shape {list(spec.shape)}, {list(parameter.shape)} is expected")
        elif spec.dtype != DTYPE_WORDS[parameter.dtype]:
            complaints.append(f"{name} is {spec.dtype}, {DTYPE_WORDS[parameter.dtype]} is expected")
    if complaints:
        shown = "; ".join(complaints[:6]) + (f"; and {len(complaints) - 6} more" if len(complaints) > 6 else "")
        raise ModelError(f"The adapter's tensors do not fit the model: {shown}.", "Use an adapter of this base, task, rank and targets.")


def write_config(path: Path, adapted: AdaptedModel, base_name: str) -> None:
    """adapter_config.json, as PEFT writes it for inference, with a base name that means something on other machines.

    `base_name` is a hub id; where it is empty the base's public name stands, never a path.
    """
    write_peft_config(path, adapted.model.peft_config[ADAPTER], base_name or adapted.public_name)


def write_peft_config(path: Path, settings: peft.PeftConfig, base_name: str) -> None:
    """As `write_config`, of settings that no model has yet."""
    config = settings.to_dict()
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    write_blocks(path, [text.encode()])


def load_existing(adapted: AdaptedModel, folder: Path) -> None:
    """Starts from an adapter that someone trained before, as a PEFT folder.

    Raises ModelError unless its rank, alpha, targets and tensors are those of the job.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The adapter folder {str(folder)!r} has no readable {CONFIG_NAME}: {error}.", "Name a folder that PEFT saved."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"The file {str(folder / CONFIG_NAME)!r} is no JSON object.", "Name a folder that PEFT saved.")
    complaints = _config_complaints(config, adapted.recipe)
    if complaints:
        raise ModelError(
            f"The adapter in {str(folder)!r} is not the job's: {'; '.join(complaints)}.",
            "Set the same LoRA values in the job, or start anew.",
        )
    state = folder / STATE_NAME
    if not state.is_file():
        raise ModelError(
            f"The adapter folder {str(folder)!r} holds no {STATE_NAME}; only safetensors is loaded.",
            "Save the adapter with PEFT's save_pretrained.",
        )
    table = codec.read_table(state)
    _check_shapes_only(table, adapted)
    tensors = read_tensors(state, table)
    with torch.no_grad():
        for trainable in adapted.trainables:
            trainable.parameter.copy_(tensors[trainable.name])


def _config_complaints(config: Mapping[str, object], recipe: Recipe) -> list[str]:
    complaints: list[str] = []
    if config.get("peft_type") != "LORA":
        complaints.append(f"its type is {config.get('peft_type')!r}, 'LORA' is needed")
    if recipe.lora is None:
        # Whole layers have no scale; whether they are those of the job is seen by their tensors.
        return complaints
    for key, wanted in (("r", recipe.lora.rank), ("lora_alpha", recipe.lora.alpha)):
        if config.get(key) != wanted:
            complaints.append(f"its {key} is {config.get(key)!r}, the job's {wanted}")
    targets = config.get("target_modules")
    if recipe.lora.targets and (not isinstance(targets, list) or sorted(map(str, targets)) != sorted(recipe.lora.targets)):
        complaints.append(f"its targets are {targets!r}, the job's {sorted(recipe.lora.targets)}")
    for key in ("use_dora", "use_rslora", "lora_bias"):
        if config.get(key):
            complaints.append(f"it was made with {key}, which changes the arithmetic")
    return complaints


def _check_shapes_only(table: codec.TensorTable, adapted: AdaptedModel) -> None:
    """An adapter from elsewhere may be stored in a half type: it is widened, which loses nothing."""
    words = {trainable.name: DTYPE_WORDS[trainable.parameter.dtype] for trainable in adapted.trainables}
    widened = tuple(
        codec.TensorSpec(
            spec.name, words.get(spec.name, spec.dtype) if spec.dtype in _DTYPES else spec.dtype, spec.shape, spec.begin, spec.end
        )
        for spec in table.specs
    )
    expected = {trainable.name: trainable.parameter for trainable in adapted.trainables}
    _check_names(codec.TensorTable(widened, table.metadata, table.data_start, table.file_size), expected)
