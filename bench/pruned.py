"""What pruning really saves: MiniLM cut to 75 and 50 % of its layers' parameters, beside the whole one: `python bench/pruned.py`.

Forward passes run in turns on one thread, so that whatever else the machine does falls on all alike; the peak of memory is that of a
process of its own for each sparsity.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import meters
import minilm

MIB = 1 << 20
SHARES = (0.0, 0.25, 0.5)
FORWARD_MAX = 0.65
"""Of the whole model's time, at 50 %."""

PRUNABLE_MAX = 0.51
ROWS, TOKENS = 8, 128


@dataclass(frozen=True)
class Point:
    """`forward_s` and `thread_s` are medians of wall and CPU seconds of one pass; `peak_bytes` the process's highest resident memory."""

    sparsity: float
    parameters: int
    prunable: int
    file_bytes: int
    forward_s: float
    thread_s: float
    ratio: float
    peak_bytes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=31, help="forward passes of each model, in turns")
    parser.add_argument("--table", action="store_true", help="put the figures into docs/benchmarks.md")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak is not None:
        print(json.dumps(_peak(given.peak)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        points = measured(Path(folder), given.runs)
    print(json.dumps([asdict(point) for point in points], indent=2) if given.json else text(points))
    if given.table:
        import sections

        sections.put("pruned", text(points, sections.measured(f"python bench/pruned.py --runs {given.runs} --table")))
    return 0 if sound(points) else 1


def measured(folder: Path, runs: int) -> list[Point]:
    """Cuts by magnitude of the weights: which units go changes no figure here."""
    import torch
    import transformers

    from fleetune import sparsity, structures
    from fleetune.model import load_pruned, prunedfolder, pruning

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers' logging is untyped
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as above
    saved: list[tuple[Any, pruning.Size, float]] = []
    for share in SHARES:
        model = transformers.AutoModel.from_pretrained(minilm.minilm_folder(), local_files_only=True).eval()
        pruned = pruning.Pruned(model, pruning.layout_of(model))
        pruned.cut_to(structures.choose(pruned.layout, pruned.structure, sparsity.keeps(pruned.layout, share), _magnitudes(pruned)))
        found = prunedfolder.save(folder / f"{share:g}", pruned)
        saved.append((found, pruned.size(), structures.sparsity(pruned.layout, pruned.structure)))
    models = [load_pruned.load(found.folder) for found, _, _ in saved]
    wall, thread = _seconds(models, runs)
    peaks = [_peak_of(found.folder) for found, _, _ in saved]
    return [
        Point(
            sparsity=share,
            parameters=size.parameters,
            prunable=size.prunable,
            file_bytes=(found.folder / "model.safetensors").stat().st_size,
            forward_s=statistics.median(wall[index]),
            thread_s=statistics.median(thread[index]),
            # Of passes that ran one after the other, so that what came between falls on both.
            ratio=statistics.median(mine / whole for mine, whole in zip(thread[index], thread[0], strict=True)),
            peak_bytes=peaks[index],
        )
        for index, (found, size, share) in enumerate(saved)
    ]


def _magnitudes(pruned: Any) -> list[list[float]]:
    import torch

    totals = [torch.zeros(group.units) for group in pruned.layout.groups]
    for name, module in pruned.model.named_modules():
        entry = pruned.layout.module_of(name)
        if entry is not None:
            group, piece = entry
            totals[group] += module.weight.detach().abs().sum(dim=1 - piece.axis).reshape(-1, piece.width).sum(dim=1)
    return [total.tolist() for total in totals]


def _seconds(models: list[Any], runs: int) -> tuple[list[list[float]], list[list[float]]]:
    import torch

    ids = torch.randint(1000, 20000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wall: list[list[float]] = [[] for _ in models]
    thread: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for model in models:
            model(**batch)
        for _ in range(runs):
            for index, model in enumerate(models):
                begun, begun_thread = time.perf_counter(), time.thread_time()
                model(**batch)
                thread[index].append(time.thread_time() - begun_thread)
                wall[index].append(time.perf_counter() - begun)
    return wall, thread


def _peak_of(folder: Path) -> int:
    done = subprocess.run([sys.executable, __file__, "--peak", str(folder)], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def _peak(folder: Path) -> int:
    """Of loading the model and one pass, in this process; the interpreter and libraries count, too."""
    import torch

    from fleetune.model import load_pruned

    torch.set_num_threads(1)
    model = load_pruned.load(folder)
    _seconds([model], 1)
    # Not getrusage's mark, which begins with that of the process that started this one.
    found = meters.memory(os.getpid())
    return found.peak if found is not None else 0


def sound(points: list[Point]) -> bool:
    whole, half = points[0], points[-1]
    return half.ratio <= FORWARD_MAX and half.prunable <= PRUNABLE_MAX * whole.prunable


def text(points: list[Point], how: str = "") -> str:
    """Markdown."""
    whole, half = points[0], points[-1]
    lines = [
        "## MiniLM pruned for good",
        "",
        f"Whole heads and feed-forward neurons are cut out; embeddings stay. A forward pass of {ROWS} rows of {TOKENS} tokens,",
        "one thread, models in turns; seconds are medians, the ratio is the median of the ratios of CPU seconds of neighbouring passes.",
        "",
        *([how, ""] if how else []),
        "| sparsity | parameters | of layers | ratio | weights, MB | pass, s | CPU s | time ratio | peak RSS, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {point.sparsity:.3f} | {point.parameters:,} | {point.prunable:,} | {point.prunable / whole.prunable:.3f} "
            f"| {point.file_bytes / 1e6:.1f} | {point.forward_s:.3f} | {point.thread_s:.3f} | {point.ratio:.3f} "
            f"| {point.peak_bytes / MIB:.0f} |"
            for point in points
        ),
        "",
        f"At 50 %: time {half.ratio:.2f} of the whole (at most {FORWARD_MAX}), parameters of layers {half.prunable / whole.prunable:.3f} "
        f"(at most {PRUNABLE_MAX}): {'met' if sound(points) else 'MISSED'}.",
        f"What no pruning touches, embeddings above all, is {_rest(whole):.0%} of the whole model and {_rest(half):.0%} of the half one.",
    ]
    return "\n".join(lines)


def _rest(point: Point) -> float:
    return 1.0 - point.prunable / point.parameters


if __name__ == "__main__":
    sys.exit(main())
