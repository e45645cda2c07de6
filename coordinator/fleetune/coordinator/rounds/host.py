"""The model host as the engine sees it: a child process that makes initial adapters and measures states, one request at a time."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

from fleetune.child import threads
from fleetune.child.process import ChildDied, ChildError, ChildProcess, OnEvent
from fleetune.coordinator.domain import Blob, DepthBlock, Evaluation, Failure, FailureKind, Prepared
from fleetune.coordinator.rounds.triplets import ranks_of
from fleetune.errors import FleetuneError
from fleetune.v1 import messages_pb2
from fleetune.wire import codec

MODULE = "fleetune.coordinator.modelhost"

KEEP_WARM_S = 60.0
"""To start it takes seconds, mostly torch's; jobs that are tried out follow one another sooner than this."""

KINDS: frozenset[str] = frozenset(get_args(FailureKind))


class HostError(FleetuneError):
    """The model host could not do it; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class ModelHost:
    """Owns the child. Started when first needed, ended a while after `rest` has said that no job needs it, and by `close`."""

    def __init__(self, keep_warm_s: float = KEEP_WARM_S) -> None:
        self._child = ChildProcess(MODULE, environment=threads.environment())
        self._turn = asyncio.Lock()
        self._keep_warm_s = keep_warm_s
        self._timer: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    async def prepare(self, request: Mapping[str, object], on_event: OnEvent | None = None) -> tuple[Prepared, Path]:
        """The initial adapter, and the folder that holds it and its configuration."""
        out = Path(str(request["out_folder"]))
        answer = await self._ask("prepare", request, on_event)
        files = cast("list[dict[str, object]]", answer["files"])
        table = codec.read_table(out / "adapter_model.safetensors")
        prepared = Prepared(
            state=Blob(str(answer["state_digest"]), _int(answer["size_bytes"])),
            trainables_digest=str(answer["trainables_digest"]),
            base_digest=str(answer["base_digest"]),
            hub_id=str(answer["hub_id"]),
            revision=str(answer["revision"]),
            base_name=str(answer.get("base_name") or answer["hub_id"]),
            base_folder=str(answer["base_folder"]),
            files=tuple((str(f["name"]), str(f["digest"]), _int(f["size_bytes"])) for f in files),
            adapter_config=(out / "adapter_config.json").read_text(encoding="utf-8"),
            parameters=_int(answer["parameters"]),
            trainable_parameters=_int(answer["trainable_parameters"]),
            blocks=_blocks(answer, table),
            ranks=ranks_of(table) if request.get("triplets") else {},
        )
        return prepared, out

    async def evaluate(
        self, base_folder: str, recipe: messages_pb2.Recipe, state: Path, rows: Path, structure: str = "", *, triplets: bool = False
    ) -> Evaluation:
        """`structure` is the hex of what is left of the model; empty: all of it. `triplets`: whether the state's adapters are such."""
        fields = {
            "triplets": triplets,
            "structure": structure,
            "base_folder": base_folder,
            "recipe": encode(recipe),
            "state_path": str(state),
            "rows_path": str(rows),
        }
        answer = await self._ask("evaluate", fields, None)
        metrics = cast("dict[str, float]", answer["metrics"])
        return Evaluation({name: float(value) for name, value in metrics.items()}, _int(answer["rows"]))

    def rest(self) -> None:
        """Nobody needs the child for now: it ends, unless it is asked again within `keep_warm_s`."""
        self._stay()
        self._timer = asyncio.get_running_loop().call_later(self._keep_warm_s, self._begin_to_end)

    async def close(self) -> None:
        self._stay()
        if self._ending is not None:
            await asyncio.wait({self._ending})
        await self._child.stop()

    def _stay(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_to_end(self) -> None:
        self._timer = None
        self._ending = asyncio.create_task(self._end(), name="end of the model host")

    async def _end(self) -> None:
        # Whoever asks meanwhile waits for its turn and starts another child.
        async with self._turn:
            await self._child.stop()

    async def _ask(self, op: str, fields: Mapping[str, object], on_event: OnEvent | None) -> dict[str, object]:
        self._stay()
        async with self._turn:
            try:
                return await self._child.request(op, fields, on_event)
            except ChildError as error:
                kind = error.kind if error.kind in KINDS else "internal"
                raise HostError(Failure(cast("FailureKind", kind), error.stage or op, error.message, error.traceback)) from error
            except ChildDied as error:
                await self._child.stop()
                died: FailureKind = "out_of_memory" if error.death.out_of_memory else "crash"
                raise HostError(Failure(died, op, error.message, error.death.stderr_tail)) from error


def encode(message: messages_pb2.Recipe) -> str:
    return base64.b64encode(message.SerializeToString()).decode("ascii")


def _blocks(answer: Mapping[str, object], table: codec.TensorTable) -> tuple[DepthBlock, ...]:
    """By depth from the loss; the host tells them as the layers are counted, the head last."""
    groups = cast("list[list[str]]", answer.get("blocks") or [])
    names = cast("list[str]", answer.get("block_names") or [f"block.{number}" for number in range(len(groups))])
    found = [
        DepthBlock(name, tuple(tensors), sum(math.prod(table.by_name[tensor].shape) for tensor in tensors))
        for name, tensors in zip(names, groups, strict=True)
    ]
    return tuple(reversed(found))


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise FleetuneError(f"the model host answered {value!r} where a whole number belongs.")
    return value
