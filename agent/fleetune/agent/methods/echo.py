"""Method `echo`: the device at once returns the global state plus a constant of its own.

A link test for operators and the method of the benchmarks: everything of a round is real except the training.

| symbol | name |
| --- | --- |
| w_t (global state) | `state_path` |
| c_k (the device's constant) | `constant` |
| w_t + c_k (update) | `out_path` |

Siblings: proto/fleetune/methods/v1/echo.proto, coordinator/fleetune/coordinator/methods/echo.py.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune.agent.methods.work import Trained, Work, peak_rss_bytes
from fleetune.agent.trainer.pace import Pace
from fleetune.child.entry import Emit
from fleetune.errors import ModelError, UnsupportedError
from fleetune.methods.v1 import echo_pb2
from fleetune.v1 import messages_pb2
from fleetune.wire import codec, digests

SLAB_BYTES = 1 << 20
"""Read, changed, hashed and written at once; small enough to stay in the processor's cache."""

_Bytes = npt.NDArray[np.uint8]

_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def train(work: Work, emit: Emit) -> Trained:
    """Streams the state through memory slab by slab, adding the constant. The update holds full values, not a delta."""
    if work.out_path is None:
        raise UnsupportedError("An echo task came without a place for its update.", "This is a bug of the agent; report it.")
    started = time.monotonic()
    task = echo_pb2.EchoTask()
    if not work.task.payload.Unpack(task):
        raise UnsupportedError(
            f"The echo task holds {work.task.payload.type_url!r}, EchoTask is expected.", "Use the same version of Fleetune on both sides."
        )
    table = codec.read_table(work.state_path)
    _check_digest(table, work.task.trainables_digest)
    specs = codec.pack((spec.name, spec.dtype, spec.shape) for spec in table.specs)
    header = codec.build_header(specs, {"fleetune.update": "state"})
    pace = Pace(emit, "training")
    total_bytes = sum(spec.size_bytes for spec in specs)
    done_bytes = 0
    running = digests.running()
    running.update(header)
    aside = work.out_path.with_name(f".{work.out_path.name}.part")
    slab: _Bytes = np.empty(SLAB_BYTES, np.uint8)
    source = os.open(work.state_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Unbuffered: a slab is larger than any buffer and must not be copied once more.
        with open(aside, "wb", buffering=0) as out:
            _write(out.fileno(), memoryview(header))
            for spec in table.specs:
                for begin in range(spec.begin, spec.end, SLAB_BYTES):
                    part = slab[: min(SLAB_BYTES, spec.end - begin)]
                    _read(source, part, table.data_start + begin)
                    _add(part, spec.dtype, task.constant)
                    view = part.data
                    running.update(view)
                    _write(out.fileno(), view)
                    done_bytes += len(view)
                    if done_bytes < total_bytes:  # the result itself says that it is done
                        pace.at(done_bytes, total_bytes)
        os.replace(aside, work.out_path)
    finally:
        os.close(source)
        aside.unlink(missing_ok=True)
    report = messages_pb2.UpdateReport(samples=1, peak_rss_bytes=peak_rss_bytes())
    report.payload.Pack(echo_pb2.EchoReport(constant=task.constant))
    report.seconds.add(name="train", value=time.monotonic() - started)
    return Trained(report, running.hexdigest(), len(header) + total_bytes)


def evaluate(work: Work, emit: Emit) -> messages_pb2.Evaluation:
    """There is no model to measure: one row, loss 0, once the state's header is sound."""
    _check_digest(codec.read_table(work.state_path), work.task.trainables_digest)
    emit("progress", stage="evaluating", done=1, total=1)
    evaluation = messages_pb2.Evaluation(rows=1)
    evaluation.metrics.add(name="loss", value=0.0)
    return evaluation


def _check_digest(table: codec.TensorTable, expected: str) -> None:
    found = codec.trainables_digest(table)
    if expected and found != expected:
        raise ModelError(
            f"The state has the trainables digest {found[:12]}, the task expects {expected[:12]}.",
            "The coordinator sent a state of another job; report this.",
        )


def _add(part: _Bytes, dtype: str, constant: int) -> None:
    """Adds in place, in the tensor's own type; integers wrap round."""
    if dtype == "BF16":
        _add_bfloat16(part, constant)
        return
    if dtype not in _NUMPY_DTYPES:
        raise UnsupportedError(
            f"echo cannot add to tensors of {dtype}; allowed: {', '.join(_NUMPY_DTYPES)}, BF16.", "Use a state of numbers."
        )
    values: npt.NDArray[Any] = part.view(_NUMPY_DTYPES[dtype])  # any of the number types above
    np.add(values, np.array(constant).astype(values.dtype), out=values)


def _add_bfloat16(part: _Bytes, constant: int) -> None:
    """bfloat16 is the upper half of a float32; the sum is rounded to the nearest, ties to even."""
    halves = part.view("<u2")
    wide = (halves.astype("<u4") << 16).view("<f4") + np.float32(constant)
    bits = wide.view("<u4")
    halves[:] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _read(fd: int, part: _Bytes, offset: int) -> None:
    view = part.data
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise ModelError("The state file became shorter while it was read.", "Fetch it again.")
        done += count


def _write(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
