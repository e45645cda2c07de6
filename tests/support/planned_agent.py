"""A coordinator's side of planned rounds without a model: a model host that makes a state of plain numbers, and agents that train it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from fleetune.child.process import OnEvent
from fleetune.coordinator.domain import Blob, DepthBlock, Prepared
from fleetune.coordinator.rounds.host import ModelHost
from fleetune.methods.v1 import deft_pb2
from fleetune.v1 import blob_pb2, fleet_pb2, messages_pb2
from fleetune.wire import codec
from support.echo_agent import EchoAgent

DEPTHS = 4
VALUES = 8
"""Numbers at each depth."""

NAMES = tuple(f"layer.{DEPTHS - depth}.weight" for depth in range(1, DEPTHS + 1))
"""Tensors by depth from the loss."""


def file_of(tensors: Sequence[tuple[str, np.ndarray[tuple[int], np.dtype[np.float32]]]], **metadata: str) -> bytes:
    """A safetensors file of float32 vectors."""
    ordered = sorted(tensors)
    header = codec.build_header(codec.pack((name, "F32", value.shape) for name, value in ordered), {"format": "pt", **metadata})
    return header + b"".join(value.astype("<f4").tobytes() for _, value in ordered)


def hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model host prepare `DEPTHS` layers of zeros at once."""

    async def prepare(self: ModelHost, request: dict[str, object], on_event: OnEvent | None = None) -> tuple[Prepared, Path]:
        out = Path(str(request["out_folder"]))
        data = file_of([(name, np.zeros(VALUES, np.float32)) for name in NAMES])
        state = out / "adapter_model.safetensors"
        state.write_bytes(data)
        digest = codec.trainables_digest(codec.read_table(state))
        blocks = tuple(DepthBlock(name.removesuffix(".weight"), (name,), VALUES) for name in NAMES)
        return Prepared(Blob(blake3(data).hexdigest(), len(data)), digest, base_digest="0" * 64, adapter_config="{}", blocks=blocks), out

    monkeypatch.setattr(ModelHost, "prepare", prepare)


def job(folder: Path, rounds: int = 2, minimum: int = 1, *, method: str = 'layout = "blocks"', rest: str = "") -> str:
    """A job file of method deft."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    return f"""
name = "planned"
[model]
base = "{base}"
[task]
kind = "text-classification"
labels = ["red", "green"]
[data]
name = "colours"
text = "text"
label = "label"
[training]
batch_size = 4
[method]
name = "deft"
{method}
[rounds]
count = {rounds}
[devices]
minimum = {minimum}
[evaluation]
source = "none"
{rest}
"""


class PlannedAgent(EchoAgent):
    """Measures as it is told to be, and sends a gradient of ones for the depths of its task."""

    def __init__(
        self,
        address: str,
        name: str,
        *,
        step_s: Sequence[float] = (0.001, 0.002, 0.003, 0.004),
        step_bytes: Sequence[int] = (100, 200, 300, 400),
        room_bytes: int = 0,
        up_bits_per_s: float = 8e6,
        samples: int = 4,
    ) -> None:
        super().__init__(address, name, data_names=["colours"], methods=["deft"], samples=samples)
        self.hello.train_data_names.append("colours")
        self.hello.link.CopyFrom(messages_pb2.Link(up_bits_per_s=up_bits_per_s, down_bits_per_s=1e8, round_trip_s=0.001, source="measured"))
        self.figures = messages_pb2.Figures(
            batch_rows=4, step_s=step_s, step_bytes=step_bytes, loaded_bytes=1000, room_bytes=room_bytes, source="measured"
        )
        self.measured = 0
        self.trained_depths: list[tuple[int, ...]] = []
        self.rates: asyncio.Queue[fleet_pb2.SetUplink] = asyncio.Queue()

    async def answer(self, task: messages_pb2.Task) -> messages_pb2.Receipt:
        if task.kind != messages_pb2.TASK_KIND_MEASURE:
            return await super().answer(task)
        self.measured += 1
        await self.say(outcome=fleet_pb2.TaskOutcome(task_id=task.task_id, lease=task.lease, figures=self.figures))
        return await self.next_receipt()

    async def trained(self, task: messages_pb2.Task) -> bytes:
        payload = deft_pb2.DeftTask()
        assert task.payload.Unpack(payload)
        assert payload.depth_count == DEPTHS
        self.trained_depths.append(tuple(payload.depths))
        await self.download(task.state.digest)
        ones = np.ones(VALUES, np.float32)
        return file_of([(NAMES[depth - 1], ones) for depth in payload.depths], **{"fleetune.update": "gradient"})

    def header(self, task: messages_pb2.Task, data: bytes, **changes: object) -> blob_pb2.UploadHeader:
        made = super().header(task, data, **changes)
        made.report.figures.CopyFrom(self.figures)
        return made

    def _heard(self, body: str | None, response: fleet_pb2.SessionResponse) -> None:
        if body == "set_uplink":
            self.rates.put_nowait(response.set_uplink)
        else:
            super()._heard(body, response)
