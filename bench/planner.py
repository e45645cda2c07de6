"""How long planning takes, and what a round would take by each solver on simulated fleets."""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune.coordinator.planner import baselines, crunch, dual, jbba
from fleetune.coordinator.planner.links import rate_bits_per_s
from fleetune.coordinator.planner.plan import plan
from fleetune.coordinator.planner.predict import predictions
from fleetune.coordinator.planner.problem import Fleet, fleet_of
from fleetune.coordinator.planner.split import Split, best_split, equal_split, equal_times

Floats = npt.NDArray[np.float64]

# RoBERTa-base: 12 layers of 7.08 M parameters; LoRA of rank 8 on query and value is 24 576 of them a layer. 32-bit values.
LAYER_BITS = {"full": 7.08e6 * 32, "lora": 24_576.0 * 32}
# Of a step on all 12 layers: the forward pass, and each layer's backward, as measured on a RoBERTa-shaped model (131 + 11.1 l ms).
FORWARD_PART, LAYER_PART = 131 / 264.2, 11.1 / 264.2
# A batch of 16 x 128 tokens through 85 M parameters, forward and backward without the frozen weights' gradients.
STEP_FLOP = 2 * 2 * 85e6 * 16 * 128


@dataclass(frozen=True)
class Setting:
    """One row of fleets."""

    payload: str
    devices: int
    blocks: int
    spread: float
    memory: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["all", "time", "fleets"], default="all")
    parser.add_argument("--repeats", type=int, default=9, help="of each timing; the median counts")
    parser.add_argument("--fleets", type=int, default=30, help="of each setting")
    parser.add_argument("--spread", type=float, default=4.0, help="fastest by slowest, in computing and again in link rate")
    parser.add_argument("--random", type=int, default=5, help="random matchings of each fleet")
    parser.add_argument("--memory", action="store_true", help="about half of the devices cannot hold the deepest blocks")
    parser.add_argument("--each", action="store_true", help="a line for each fleet as well")
    arguments = parser.parse_args()
    print(f"machine: {_cpu()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}")
    if arguments.part in {"all", "time"}:
        _time(arguments.repeats)
    if arguments.part in {"all", "fleets"}:
        for setting in _settings(arguments.spread, arguments.memory):
            _compare(setting, arguments.fleets, arguments.random, each=arguments.each)
    return 0


# ------------------------------------------------------------------------------------------------------------------ fleets


def _settings(spread: float, memory: bool) -> Iterator[Setting]:
    for payload in ("full", "lora"):
        for devices, blocks in ((12, 12), (24, 12), (50, 12)):
            yield Setting(payload, devices, blocks, spread, memory)


def _fleet(setting: Setting, rng: np.random.Generator) -> Fleet:
    """Airtime of one cell: computing and solo link rate are log-uniform and independent. Every block can be covered."""
    while True:
        flops = 10e9 * np.exp(rng.uniform(0, math.log(setting.spread), setting.devices))
        rates = 10e6 * np.exp(rng.uniform(0, math.log(setting.spread), setting.devices))
        parts = FORWARD_PART + LAYER_PART * np.arange(1, setting.blocks + 1)
        ready = STEP_FLOP / flops[:, None] * parts[None, :]
        reach = rng.integers(1, 2 * setting.blocks, setting.devices) if setting.memory else np.full(setting.devices, setting.blocks)
        fits = np.arange(setting.blocks)[None, :] < reach[:, None]
        fleet = fleet_of(ready, np.full(setting.blocks, LAYER_BITS[setting.payload]), rates, 1.0, fits=fits, kind="airtime")
        if crunch.match(equal_times(fleet)) is not None:
            return fleet


def _compare(setting: Setting, fleets: int, random_matchings: int, *, each: bool) -> None:
    """Round latency by each solver under hard caps, and, in the second column, with idle airtime shared out (work-conserving)."""
    capped: dict[str, list[float]] = {}
    shared: dict[str, list[float]] = {}
    rows: dict[str, list[float]] = {}
    names = list(_plans(_fleet(setting, np.random.default_rng(0)), random_matchings, 0))
    words = f"{setting.payload} payload, {setting.devices} devices, {setting.blocks} blocks, {setting.spread:g}x apart"
    print(f"\n{words}{', limited memory' if setting.memory else ''}, {fleets} fleets")
    if each:
        print("  fleet  " + "  ".join(f"{name:>15}" for name in names))
    for index in range(fleets):
        fleet = _fleet(setting, np.random.default_rng([index, setting.devices, setting.blocks]))
        for name, options in _plans(fleet, random_matchings, index).items():
            capped.setdefault(name, []).append(statistics.fmean(split.round_s for _, split in options))
            shared.setdefault(name, []).append(
                statistics.fmean(simulated_s(fleet, device_of, split.shares) for device_of, split in options)
            )
        made = plan(fleet)
        for one in predictions(fleet, made, 1.0, 1.0):
            rows.setdefault(one.method, []).append(one.seconds_per_full_gradient_row or math.nan)
            capped.setdefault(f"({one.method})", []).append(one.round_seconds or math.nan)
        if each:
            print(f"  {index:5}  " + "  ".join(f"{capped[name][-1]:15.2f}" for name in names))
    exact = np.array(capped["exact"])
    print(f"  {'':24} {'round s':>9} {'with idle shared':>17} {'exact is shorter by':>20} {'least':>7} {'most':>7}")
    for name in names:
        print(f"  {name:24} {np.mean(capped[name]):9.2f} {np.mean(shared[name]):17.2f} {_shorter(exact, capped[name])}")
    for method in rows:
        if method == "deft":
            continue
        times = capped[f"({method})"]
        print(f"  {method:24} {np.nanmean(times):9.2f} {'-':>17} {_shorter(exact, times)}")
    base = np.mean(rows["deft"])
    print("  seconds for a batch of full gradient, DEFT = 1: " + ", ".join(f"{name} {np.nanmean(rows[name]) / base:.2f}" for name in rows))


def _shorter(exact: Floats, times: Sequence[float]) -> str:
    """Mean, least and most of the part by which a round of the exact solver is shorter, fleet by fleet."""
    less = 1 - exact / np.array(times)
    return f"{np.nanmean(less):20.1%} {np.nanmin(less):7.1%} {np.nanmax(less):7.1%}"


def _plans(fleet: Fleet, random_matchings: int, seed: int) -> dict[str, list[tuple[npt.NDArray[np.intp], Split]]]:
    """Matchings and their shares, one or several for each solver; the fleet covers every block."""
    rng = np.random.default_rng(seed)
    exact, ascended = _there(jbba.solve(fleet)), _there(dual.solve(fleet))
    matched = _there(crunch.match(equal_times(fleet))).device_of
    greedy = _there(baselines.greedy_matching(fleet))
    at_random = [_there(baselines.random_matching(fleet, rng)) for _ in range(random_matchings)]
    return {
        "exact": [(exact.device_of, exact.split)],
        "dual, ascent alone": [(ascended.device_of, ascended.split)],
        "crunch, optimal split": [(matched, best_split(fleet, matched))],
        "crunch-equal": [(matched, equal_split(fleet, matched))],
        "greedy-equal": [(greedy, equal_split(fleet, greedy))],
        "random, optimal split": [(one, best_split(fleet, one)) for one in at_random],
        "random-equal": [(one, equal_split(fleet, one)) for one in at_random],
    }


def simulated_s(fleet: Fleet, device_of: npt.NDArray[np.intp], shares: Floats) -> float:
    """When the last upload ends if shares are weights: from event to event, whoever is uploading shares the whole resource by weight,
    none beyond its own cap."""
    blocks = np.arange(device_of.size)
    ready = fleet.ready_s[device_of, blocks]
    left, caps = fleet.payload_bits.copy(), fleet.max_share[device_of]
    now_s = 0.0
    while (left > 0).any():
        active = (left > 0) & (ready <= now_s)
        coming = ready[(left > 0) & (ready > now_s)]
        next_s = float(coming.min()) if coming.size else math.inf
        if active.any():
            rates = rate_bits_per_s(_weighted(shares, caps, active, fleet.total), fleet.bits_per_unit[device_of], fleet.snr_hz[device_of])
            ends = now_s + left[active] / rates[active]
            first = float(ends.min())
            step_s = min(first, next_s) - now_s
            left = np.where(active, left - rates * step_s, left)
            left[active & (left <= 1e-9 * fleet.payload_bits)] = 0.0
            now_s = min(first, next_s)
        else:
            now_s = next_s
    return max(now_s, float(ready.max(initial=0.0)))


def _weighted(weights: Floats, caps: Floats, active: npt.NDArray[np.bool_], total: float) -> Floats:
    """The total shared out by weight, what is beyond a cap to the others."""
    given = np.zeros(weights.size)
    open_, left = active & (weights > 0), total
    while open_.any() and left > 0:
        offer = np.where(open_, left * weights / weights[open_].sum(), 0.0)
        bound = open_ & (offer > caps)
        if not bound.any():
            return given + offer
        given[bound] = caps[bound]
        left -= float(caps[bound].sum())
        open_ &= ~bound
    return given


# ------------------------------------------------------------------------------------------------------------------ timing


def _time(repeats: int) -> None:
    """Medians over as many fleets as repeats, one after the other on one thread; wall clock and CPU of this process."""
    print("\n1000 devices, 48 blocks, link and computing 4x apart; median ms (CPU ms, slowest)")
    kinds = {"lora": LAYER_BITS["lora"], "full": LAYER_BITS["full"]}
    for label, bits in kinds.items():
        _rows(label, [_large(bits, seed, radio=False) for seed in range(repeats)])
    _rows("lora, Shannon", [_large(kinds["lora"], seed, radio=True) for seed in range(repeats)])
    _rows("lora, big head", [_large(kinds["lora"], seed, radio=False, head=25.0) for seed in range(repeats)])
    _rows("full, caps", [_large(kinds["full"], seed, radio=False, caps=True) for seed in range(repeats)])


def _large(bits: float, seed: int, *, radio: bool, head: float = 1.0, caps: bool = False) -> Fleet:
    rng = np.random.default_rng(seed)
    devices, blocks = 1000, 48
    speed = np.exp(rng.uniform(0, math.log(4), devices))
    parts = FORWARD_PART + LAYER_PART * 12 / blocks * np.arange(1, blocks + 1)
    fits = np.arange(blocks)[None, :] < rng.integers(blocks // 4, 2 * blocks, devices)[:, None]
    payload = np.full(blocks, bits)
    payload[0] *= head
    return fleet_of(
        4 * STEP_FLOP / 10e9 * speed[:, None] * parts[None, :],
        payload,
        np.exp(rng.uniform(0, math.log(4), devices)),
        5e6,
        fits=fits,
        snr_hz=5e6 * np.exp(rng.uniform(0, math.log(100), devices)) if radio else None,
        max_share=rng.uniform(0.02, 0.2, devices) * 5e6 if caps else None,
        kind="hz",
    )


def _rows(label: str, fleets: list[Fleet]) -> None:
    times = [equal_times(fleet) for fleet in fleets]
    cells = {
        "plan(), exact": _measure([partial(plan, fleet, "exact") for fleet in fleets]),
        "exact": _measure([partial(jbba.solve, fleet) for fleet in fleets]),
        "CRUNCH": _measure([partial(crunch.match, matrix) for matrix in times]),
        "dual": _measure([partial(dual.solve, fleet) for fleet in fleets]),
    }
    if crunch.monotone(times[0]):
        cells["CRUNCH by cuts"] = _measure([partial(crunch.cut, matrix) for matrix in times])
    solved = statistics.median(_there(jbba.solve(fleet)).assignments_solved for fleet in fleets)
    how = _there(crunch.match(times[0])).how
    print(f"  {label:15} " + "; ".join(f"{name} {cell}" for name, cell in cells.items()) + f"; {solved:g} assignments; matched by {how}")


def _measure(calls: Sequence[Callable[[], object]]) -> str:
    calls[0]()  # scipy is loaded by the first
    walls: list[float] = []
    cpus: list[float] = []
    for call in calls:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall_s)
        cpus.append(time.process_time() - cpu_s)
    return f"{statistics.median(walls) * 1e3:.1f} ({statistics.median(cpus) * 1e3:.1f}, {max(walls) * 1e3:.1f})"


def _there(found: Any) -> Any:  # Any: whatever a solver gives; None would be a defect of the fleet made here
    if found is None:
        raise SystemExit("a fleet that covers every block was expected")
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
