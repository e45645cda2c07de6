"""What the coordinator takes to make one LoRA adapter of many of unlike ranks: MiniLM's shapes, files on disk, everything in float64.

    .venv/bin/python bench/loraaggregate.py [--devices 32] [--rank 8] [--repeats 7] [--write]

Each figure is a whole fold: updates read, pairs averaged, cut and written, the state flushed and hashed. CPU seconds are the
process's and tell what it costs where the machine is busy. The rules take turns, so that all meet the same load. What the fold makes
is compared with the dense mean.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sections
from threadpoolctl import threadpool_limits

from fleetune.coordinator.lora.rules import RULES, Aggregation, LoraFold
from fleetune.coordinator.rounds import lorafold
from fleetune.coordinator.rounds.aggregate import KIND_KEY, Contribution, FoldPlan
from fleetune.wire import codec

HIDDEN, INNER, LAYERS = 384, 1536, 6
SCALE = 2.0
LINEARS: Mapping[str, tuple[int, int]] = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (INNER, HIDDEN),
    "output.dense": (HIDDEN, INNER),
}
TARGETS = {"query, value": ("attention.self.query", "attention.self.value"), "all six linears": tuple(LINEARS)}
GOAL_S = {"query, value": 0.5, "all six linears": 2.0}
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    targets: str
    ranks: str
    aggregation: Aggregation
    plan: FoldPlan
    rule: LoraFold


@dataclass
class Taken:
    wall_s: list[float]
    cpu_s: list[float]
    error: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cases = list(_cases(Path(name), options))
        taken = {index: Taken([], []) for index in range(len(cases))}
        for _ in range(options.repeats):
            for index, case in enumerate(cases):
                before_s, before_cpu_s = time.perf_counter(), time.process_time()
                result = lorafold.fold(case.plan, case.rule)
                taken[index].wall_s.append(time.perf_counter() - before_s)
                taken[index].cpu_s.append(time.process_time() - before_cpu_s)
                taken[index].error = result.metrics["aggregation_error"]
        with threadpool_limits(1, "blas"):
            exactness = {case.targets: _exactness(case) for case in cases if case.aggregation == "exact" and case.ranks == "equal"}
    text = _section(options, cases, taken, exactness)
    print(text)
    if options.write:
        sections.put("lora-aggregation", text)
    return 0


def _cases(folder: Path, options: argparse.Namespace) -> list[Case]:
    rng = np.random.default_rng(0)
    found: list[Case] = []
    for targets, modules in TARGETS.items():
        names = [f"base_model.model.bert.encoder.layer.{layer}.{module}" for layer in range(LAYERS) for module in modules]
        shapes = [LINEARS[module] for _ in range(LAYERS) for module in modules]
        kinds = {"equal": [options.rank] * options.devices, "1 to r": [1 + index % options.rank for index in range(options.devices)]}
        base = _file(folder / f"{targets}-base", names, shapes, options.rank, {"format": "pt"}, rng)
        for kind, ranks in kinds.items():
            contributions = tuple(
                Contribution(
                    f"d{index:03}",
                    _file(folder / f"{targets}-{kind}-{index}", names, shapes, rank, {KIND_KEY: "delta"}, rng, 0.1),
                    100 + index,
                )
                for index, rank in enumerate(ranks)
            )
            rules: Sequence[Aggregation] = ("exact", "fedit", "zero-pad") if kind == "equal" else ("exact",)
            assert set(rules) <= set(RULES)
            for aggregation in rules:
                plan = FoldPlan(base, contributions, folder / f"{targets}-{kind}-{aggregation}-out")
                found.append(Case(targets, kind, aggregation, plan, LoraFold(aggregation, options.rank, SCALE, narrower=True)))
    return found


def _file(
    path: Path,
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rank: int,
    metadata: dict[str, str],
    rng: np.random.Generator,
    size: float = 1.0,
) -> Path:
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    for name, (rows, columns) in zip(names, shapes, strict=True):
        layout += [(f"{name}.lora_A.weight", "F32", (rank, columns)), (f"{name}.lora_B.weight", "F32", (rows, rank))]
    specs = codec.pack(layout)
    with path.open("wb") as file:
        file.write(codec.build_header(specs, metadata))
        for spec in specs:
            # Rows of A are as long as PEFT makes them.
            values = rng.standard_normal(spec.elements, np.float32) * np.float32(size / np.sqrt(3 * max(spec.shape)))
            file.write(values.tobytes())
    return path


def _exactness(case: Case) -> float:
    """The largest relative distance of a module from the best of its rank of the dense mean, which is formed here by other means."""
    paths = [contribution.path for contribution in case.plan.contributions]
    weights = [contribution.weight for contribution in case.plan.contributions]
    base, after = _tensors(case.plan.base_state), _tensors(case.plan.out_state)
    mean = {name: np.zeros((len(base[_left(name)]), base[name].shape[1])) for name in base if "lora_A" in name}
    for path, weight in zip(paths, weights, strict=True):
        sent = _tensors(path)
        for name in mean:
            product = (base[_left(name)] + sent[_left(name)]) @ (base[name] + sent[name])
            mean[name] += weight / sum(weights) * case.rule.scale * product
    worst = 0.0
    for name, dense in mean.items():
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        best = (left[:, : case.rule.rank] * values[: case.rule.rank]) @ right[: case.rule.rank]
        found = case.rule.scale * after[_left(name)] @ after[name]
        worst = max(worst, float(np.linalg.norm(found - best) / np.linalg.norm(best)))
    return worst


def _left(name: str) -> str:
    return name.replace("lora_A", "lora_B")


def _tensors(path: Path) -> dict[str, Floats]:
    table, data = codec.read_table(path), path.read_bytes()
    return {
        spec.name: np.frombuffer(data, np.float32, spec.elements, table.data_start + spec.begin).reshape(spec.shape).astype(np.float64)
        for spec in table.specs
    }


def _section(options: argparse.Namespace, cases: Sequence[Case], taken: Mapping[int, Taken], exactness: Mapping[str, float]) -> str:
    lines = [
        "## One adapter of many",
        "",
        f"MiniLM, {options.devices} devices, lora.rank {options.rank}: seconds of a whole fold, median of {options.repeats} "
        "(CPU: of the one thread that it takes). The error is that of the folded adapter against the exact mean, on random updates.",
        "",
        "| LoRA on | ranks | aggregation | wall | CPU | goal | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for index, case in enumerate(cases):
        found = taken[index]
        wall_s, cpu_s = statistics.median(found.wall_s), statistics.median(found.cpu_s)
        goal = f"{GOAL_S[case.targets]:g} s" if case.aggregation == "exact" else ""
        cells = (case.targets, case.ranks, case.aggregation, f"{wall_s:.2f} s", f"{cpu_s:.2f} s", goal, f"{found.error:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    words = ", ".join(f"{targets}: {error:.1e}" for targets, error in exactness.items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines += [
        "",
        f"Largest relative distance of a module from the best adapter for the dense mean, which was formed by itself: {words}. "
        f"The process took {peak:.0f} MiB at its peak, the dense comparison included. "
        f"{os.cpu_count()} cores had {os.getloadavg()[0]:.0f} processes to run meanwhile: where that is more, wall time is mostly waiting.",
        "",
        sections.measured(f"python bench/loraaggregate.py {' '.join(sys.argv[1:])}".strip()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
