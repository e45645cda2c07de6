"""A coordinator's side of falling ranks without a model: a model host that makes a state of a few triplets, and agents that train it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3

from fleetune.child.process import OnEvent
from fleetune.coordinator.domain import Blob, Prepared
from fleetune.coordinator.rounds import triplets
from fleetune.coordinator.rounds.host import ModelHost
from fleetune.methods.v1 import fedara_pb2
from fleetune.v1 import blob_pb2, messages_pb2
from fleetune.wire import codec
from support.echo_agent import EchoAgent

PREFIX = "base_model.model."
RANKS = {"layer.0.query": 4, "layer.1.query": 4}
INPUTS, OUTPUTS = 3, 5

Values = npt.NDArray[np.float32]


def file_of(tensors: Mapping[str, Values], **metadata: str) -> bytes:
    """A safetensors file of float32."""
    ordered = sorted(tensors.items())
    header = codec.build_header(codec.pack((name, "F32", value.shape) for name, value in ordered), {"format": "pt", **metadata})
    return header + b"".join(value.astype("<f4").tobytes() for _, value in ordered)


def tensors_of(ranks: Mapping[str, int], value: float = 1.0) -> dict[str, Values]:
    """A state, or an update, of these ranks, and a head of two numbers."""
    found: dict[str, Values] = {f"{PREFIX}classifier.bias": np.full(2, value, np.float32)}
    for name, rank in ranks.items():
        for part, shape in (("A", (rank, INPUTS)), ("B", (OUTPUTS, rank)), ("E", (rank,))):
            found[f"{PREFIX}{name}.lora_{part}"] = np.full(shape, value, np.float32)
    return found


def hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model host prepare two modules of four triplets at once."""

    async def prepare(self: ModelHost, request: dict[str, object], on_event: OnEvent | None = None) -> tuple[Prepared, Path]:
        assert request["triplets"] is True
        out = Path(str(request["out_folder"]))
        data = file_of(tensors_of(RANKS))
        state = out / "adapter_model.safetensors"
        state.write_bytes(data)
        table = codec.read_table(state)
        made = Prepared(
            Blob(blake3(data).hexdigest(), len(data)),
            codec.trainables_digest(table),
            base_digest="0" * 64,
            adapter_config='{"peft_type": "LORA", "r": 4, "target_modules": ["query"]}',
            ranks=triplets.ranks_of(table),
        )
        return made, out

    monkeypatch.setattr(ModelHost, "prepare", prepare)


def job(folder: Path, rounds: int = 3, minimum: int = 1, method: str = "") -> str:
    """A job file of method fedara that ends with a quarter of the triplets."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    return f"""
name = "ranked"
[model]
base = "{base}"
[task]
kind = "text-classification"
labels = ["red", "green"]
[lora]
rank = 4
alpha = 8
[data]
name = "colours"
[method]
name = "fedara"
warm_share = 0
final_share = 0
{method}
[rounds]
count = {rounds}
[devices]
minimum = {minimum}
[evaluation]
source = "none"
"""


class RankedAgent(EchoAgent):
    """Adds ones to all that its task names, and scores a module's triplets by their places; `scores` are sent instead where given."""

    def __init__(self, address: str, name: str) -> None:
        super().__init__(address, name, data_names=["colours"], methods=["fedara"], samples=4)
        self.hello.train_data_names.append("colours")
        self.ranks: list[dict[str, int]] = []
        self.scores: dict[str, bytes] | None = None
        self.tensors: dict[str, Values] | None = None

    async def trained(self, task: messages_pb2.Task) -> bytes:
        payload = fedara_pb2.FedaraTask()
        assert task.payload.Unpack(payload)
        self.ranks.append(dict(payload.ranks))
        state = await self.download(task.state.digest)
        length = 8 + int.from_bytes(state[:8], "little")
        table = codec.parse_header(state[:length], len(state))
        assert codec.trainables_digest(table) == task.trainables_digest
        assert triplets.ranks_of(table) == self.ranks[-1]
        return file_of(self.tensors or tensors_of(self.ranks[-1]), **{"fleetune.update": "delta"})

    def header(self, task: messages_pb2.Task, data: bytes, **changes: object) -> blob_pb2.UploadHeader:
        made = super().header(task, data, **changes)
        scores = self.scores
        if scores is None:
            scores = {name: np.arange(1, rank + 1, dtype="<f2").tobytes() for name, rank in self.ranks[-1].items()}
        report = fedara_pb2.FedaraReport(scores=[fedara_pb2.TripletScores(module=name, float16=raw) for name, raw in scores.items()])
        made.report.payload.Pack(report)
        return made
