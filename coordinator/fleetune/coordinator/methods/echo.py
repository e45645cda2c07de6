"""Method `echo`: each device at once returns the global state plus a constant of its own.

Paper: none; a link test for operators, and what the benchmark moves.
Idea: the payload is the smallest task there is, so that a round costs what the transport, the store and the fold cost. Constants
are whole numbers, so that the mean is exact in float32 and can be checked to the last bit.

    symbol  name in code
    S       method.state_mib     size of the global state
    c_k     constant             what device k adds: 1 + its place among the round's device ids

Siblings: proto/fleetune/methods/v1/echo.proto, agent/fleetune/agent/methods/echo.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from fleetune.coordinator.domain import Blob, UpdateKind
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.methods.base import Initial, RoundFacts
from fleetune.coordinator.rounds.optimizers import ServerOptimizer
from fleetune.methods.v1 import echo_pb2
from fleetune.wire import codec, digests

TENSOR_BYTES = 1 << 20
"""The state is cut into tensors of this size, as a real adapter has many."""


class Echo:
    name = "echo"
    needs_model = False
    plans = False
    prunes = False

    def assign(self, spec: JobSpec, facts: RoundFacts) -> Mapping[str, Message]:
        return {device: echo_pb2.EchoTask(constant=place + 1) for place, device in enumerate(sorted(facts.devices))}

    def fold(self, spec: JobSpec, number: int) -> ServerOptimizer | None:
        return None

    def kinds(self, spec: JobSpec) -> frozenset[UpdateKind]:
        return frozenset({"state", "delta"})

    def initial(self, spec: JobSpec, path: Path) -> Initial:
        """Zeros of `method.state_mib`, written a tensor at a time."""
        total = max(4, int(spec.method.state_mib * (1 << 20)) // 4 * 4)
        specs: list[codec.TensorSpec] = []
        begin = 0
        while begin < total:
            size = min(TENSOR_BYTES, total - begin)
            specs.append(codec.TensorSpec(f"echo.{len(specs):05d}", "F32", (size // 4,), begin, begin + size))
            begin += size
        header = codec.build_header(specs, {"format": "pt"})
        digest = digests.running()
        digest.update(header)
        with path.open("wb") as file:
            file.write(header)
            for spec_ in specs:
                zeros = bytes(spec_.end - spec_.begin)
                digest.update(zeros)
                file.write(zeros)
            file.flush()
            os.fsync(file.fileno())
        table = codec.read_table(path)
        return Initial(Blob(digest.hexdigest(), path.stat().st_size), codec.trainables_digest(table))


METHOD = Echo()
