"""Throughput of the fold, of checking an update and of the spool, on files in a folder of this machine."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fleetune.coordinator.rounds import aggregate
from fleetune.coordinator.rounds.optimizers import OPTIMIZERS, AdamW
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.v1 import messages_pb2
from fleetune.wire import chunks, codec, digests

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=128, help="size of the state in MiB (float32)")
    parser.add_argument("--devices", type=int, default=4, help="updates to fold")
    parser.add_argument("--tensors", type=int, default=256, help="tensors of the state")
    parser.add_argument("--dtype", choices=["F32", "F16", "BF16"], default="F32", help="of the updates")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slab-kib", type=int, default=aggregate.SLAB_BYTES >> 10)
    parser.add_argument("--folder", type=Path, default=None, help="where the files lie; default: the temporary folder")
    arguments = parser.parse_args()
    print(f"machine: {_cpu()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        _measure(Path(name), arguments)
    return 0


def _measure(folder: Path, arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    elements = arguments.mib * MIB // 4 // arguments.tensors
    layout = [(f"layer.{index:04}.lora_A.weight", (elements,)) for index in range(arguments.tensors)]
    base = _file(folder / "base", layout, "F32", {"format": "pt"}, rng)
    contributions = tuple(
        aggregate.Contribution(
            f"d{index}", _file(folder / f"d{index}", layout, arguments.dtype, {aggregate.KIND_KEY: "delta"}, rng), 100 + index
        )
        for index in range(arguments.devices)
    )
    slab_bytes = arguments.slab_kib << 10
    moved = (arguments.devices * codec.ITEM_BYTES[arguments.dtype] + 8) * elements * arguments.tensors / MIB
    plan = aggregate.FoldPlan(base, contributions, folder / "out", slab_bytes=slab_bytes)
    _report("fold", moved, arguments.repeats, partial(aggregate.fold, plan), plan.out_state)
    for kind, optimizer in OPTIMIZERS.items():
        plan = aggregate.FoldPlan(
            base, contributions, folder / f"out-{kind}", optimizer(), None, folder / f"moments-{kind}", slab_bytes=slab_bytes
        )
        _report(f"fold, {kind}, first round", moved, 1, partial(aggregate.fold, plan))
    gradients = tuple(
        aggregate.Contribution(f"d{index}", _file(folder / f"g{index}", layout, arguments.dtype, {aggregate.KIND_KEY: "gradient"}, rng), 1)
        for index in range(arguments.devices)
    )
    for words, limit in (("", 0.0), (", clipped", 1.0)):
        server = AdamW(1e-3, max_grad_norm=limit)
        plan = aggregate.FoldPlan(base, gradients, folder / "out-adamw", server, None, folder / "moments-adamw", slab_bytes=slab_bytes)
        _report(f"step, adamw{words}", moved, 1, partial(aggregate.fold, plan), plan.out_state)
    expected = codec.read_table(base)
    size = contributions[0].path.stat().st_size / MIB
    _report("inspect one update", size, arguments.repeats, lambda: aggregate.inspect(contributions[0].path, expected))
    _report("digest of one update", size, arguments.repeats, lambda: digests.of_file(contributions[0].path))
    ref = messages_pb2.BlobRef(digest=digests.of_file(contributions[0].path), size_bytes=contributions[0].path.stat().st_size)
    store = BlobStore(folder / "store")
    _report(
        "spool and adopt one update", size, arguments.repeats, lambda: _upload(store, ref, contributions[0].path), store.path(ref.digest)
    )


def _upload(store: BlobStore, ref: messages_pb2.BlobRef, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        spool = store.spool("bench", ref)
        while not spool.complete:
            spool.add(chunks.read_chunk(fd, spool.position, ref.size_bytes))
        store.adopt(spool)
        store.sync()
    finally:
        os.close(fd)


def _file(
    path: Path, layout: Sequence[tuple[str, tuple[int, ...]]], dtype: str, metadata: dict[str, str], rng: np.random.Generator
) -> Path:
    specs = codec.pack((name, dtype, shape) for name, shape in layout)
    with path.open("wb") as file:
        file.write(codec.build_header(specs, metadata))
        for spec in specs:
            values = rng.standard_normal(spec.elements, np.float32)
            if dtype == "BF16":
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            else:
                file.write(values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes())
    return path


def _report(what: str, mib: float, repeats: int, run: Callable[[], object], result: Path | None = None) -> None:
    """Times `run`; `result` is removed before each, since replacing a large file costs the file system more than a new name."""
    wall, cpu = [], []
    for _ in range(repeats):
        if result is not None:
            result.unlink(missing_ok=True)
        before_s, before_cpu_s = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - before_s)
        cpu.append(time.process_time() - before_cpu_s)
    median_s = statistics.median(wall)
    print(
        f"{what:<28} {median_s * 1e3:8.1f} ms (min {min(wall) * 1e3:.1f}, max {max(wall) * 1e3:.1f}), "
        f"CPU {statistics.median(cpu) * 1e3:.1f} ms, {mib / median_s:.0f} MiB/s"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
