"""What is lost by unlike ranks, and under which aggregation: a federated matrix regression of a few seconds, no model.

    .venv/bin/python bench/loraranks.py [--seeds 3] [--rounds 40] [--write]

Every device draws inputs and fits s B A to a 64 x 48 matrix of rank 16 (singular values 3 to 0.5) by twelve steps of Adam a round,
from the first directions of the committed pair of rank 8, as `fedavg_lora` does; for flora and fedex the others are a part of the weights.
With `own` each device has a matrix of its own around that one. Told is the squared distance of the committed product from the devices' mean
matrix, by its square. It says which way a rule goes, not how far on a real task.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import sections

from fleetune.coordinator.lora import rules
from fleetune.coordinator.lora.factors import Factors, Part
from fleetune.coordinator.lora.rules import Aggregation, LoraFold, PairFold

ROWS, COLUMNS, RANK, SCALE = 64, 48, 8, 2.0
STEPS, RATE, INPUTS = 12, 0.02, 16
AGGREGATIONS: Sequence[Aggregation] = ("exact", "flexlora", "fedit", "zero-pad", "ffa", "rolora", "flora", "fedex")
RESIDUAL_RANK = COLUMNS
"""Of flora and fedex: with it nothing is cut, so that their error may fall below what rank 8 allows."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fleet:
    words: str
    ranks: tuple[int, ...]
    a_round: int = 0
    """Devices drawn for a round; 0 is all."""


FLEETS = (
    Fleet("8, 8, 8, 8", (8, 8, 8, 8)),
    Fleet("8, 4, 2, 2", (8, 4, 2, 2)),
    Fleet("8 and seven of 2, four a round", (8, 2, 2, 2, 2, 2, 2, 2), 4),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/benchmarks.md")
    options = parser.parse_args()
    lines = [
        "## Unlike ranks, on a matrix regression",
        "",
        f"Remaining squared error after {options.rounds} rounds, mean of {options.seeds} seeds, lower is better; the best of rank 8 would "
        f"leave {_floor():.3f} where all devices fit the same matrix. A toy: it tells which way a rule goes, not how far on a real task.",
        "",
        f"| ranks | matrices | {' | '.join(AGGREGATIONS)} |",
        f"| --- | --- | {' | '.join('---' for _ in AGGREGATIONS)} |",
    ]
    for fleet in FLEETS:
        for own in (0.0, 1.0):
            errors = [np.mean([_run(name, fleet, own, seed, options.rounds) for seed in range(options.seeds)]) for name in AGGREGATIONS]
            cells = ("–" if np.isnan(error) else f"{error:.3f}" for error in errors)
            lines.append(f"| {fleet.words} | {'own' if own else 'the same'} | {' | '.join(cells)} |")
    lines += ["", sections.measured(f"python bench/loraranks.py {' '.join(sys.argv[1:])}".strip())]
    print("\n".join(lines))
    if options.write:
        sections.put("lora-ranks", "\n".join(lines))
    return 0


def _target(rng: np.random.Generator) -> Floats:
    left, right = (np.linalg.qr(rng.standard_normal((size, 2 * RANK)))[0] for size in (ROWS, COLUMNS))
    found: Floats = (left * _values()) @ right.T
    return found


def _values() -> Floats:
    return np.linspace(3, 0.5, 2 * RANK)


def _floor() -> float:
    squares = _values() ** 2
    return float(squares[RANK:].sum() / squares.sum())


def _run(aggregation: Aggregation, fleet: Fleet, own: float, seed: int, rounds: int) -> float:
    rng = np.random.default_rng(seed)
    common = _target(rng)
    targets = [common + own * rng.standard_normal(common.shape) / 8 for _ in fleet.ranks]
    mean = np.mean(targets, axis=0)
    rest = RESIDUAL_RANK if rules.RULES[aggregation].has_rest else 0
    if aggregation == "fedex" and len(set(fleet.ranks)) > 1:
        return float("nan")
    pair = Factors(np.zeros((ROWS, RANK)), rng.uniform(-1, 1, (RANK, COLUMNS)) / np.sqrt(COLUMNS), SCALE).padded(RANK + rest)
    for number in range(1, rounds + 1):
        trained = rules.trained(aggregation, number)
        chosen = sorted(rng.choice(len(fleet.ranks), fleet.a_round or len(fleet.ranks), replace=False))
        parts = [Part(f"d{i:02}", 1.0, _local(pair, fleet.ranks[i], targets[i], trained, rng, bool(rest))) for i in chosen]
        weights = rules.norm_weights({part.device_id: part.factors.norm() for part in parts}) if rules.RULES[aggregation].by_norm else None
        fold = LoraFold(aggregation, RANK + rest, SCALE, number, True, rest, seed)
        folding = PairFold(aggregation, pair, weights, rest, fold.fresh("A", COLUMNS))
        for part in parts:
            folding.add(part)
        pair = folding.result(trained).factors
    return float(np.sum((pair.dense() - mean) ** 2) / np.sum(mean**2))


def _local(pair: Factors, rank: int, target: Floats, trained: rules.Trained, rng: np.random.Generator, keeps_rest: bool) -> Factors:
    start = pair.leading(rank)
    if keeps_rest:
        target = target - SCALE * pair.left[:, rank:] @ pair.right[rank:]
    left, right = start.left.copy(), start.right.copy()
    moments = [(np.zeros_like(values), np.zeros_like(values)) for values in (left, right)]
    for step in range(1, STEPS + 1):
        inputs = rng.standard_normal((COLUMNS, INPUTS))
        gradient = (SCALE * left @ right - target) @ inputs @ inputs.T / INPUTS
        slopes = (SCALE * gradient @ right.T, SCALE * left.T @ gradient)
        for word, values, slope, (mean, square) in zip(("left", "right"), (left, right), slopes, moments, strict=True):
            if trained in ("both", word):
                mean += 0.1 * (slope - mean)
                square += 0.001 * (slope**2 - square)
                values -= RATE * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return Factors(left, right, SCALE)


if __name__ == "__main__":
    sys.exit(main())
