"""What planning costs in a round: from figures and links to the plan of each layout, and what of it the coordinator's loop bears."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from fleetune.coordinator.domain import Blob, Candidate, DepthBlock, DeviceFigures, LinkFigures, Prepared, RoundPlan
from fleetune.coordinator.domain import PlanSettings as Settings
from fleetune.coordinator.rounds import machine, planning
from fleetune.coordinator.store import records

# LoRA of rank 8 on query and value of a hidden size of 768: A and B of both.
VALUES = 24_576
NAMES = tuple(f"attention.self.{word}.lora_{letter}.weight" for word in ("query", "value") for letter in "AB")
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 50, 200, 1000])
    parser.add_argument("--blocks", type=int, nargs="+", default=[7, 12, 24, 48], help="one for each number of devices")
    parser.add_argument("--repeats", type=int, default=9, help="of each timing; the median counts")
    arguments = parser.parse_args()
    print(f"machine: {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}")
    print("milliseconds of CPU of the process, median; written: the job's machine in its transaction, on the loop as opening and taking")
    print()
    heads = ("devices x blocks", "layout", "resource", "plan", "open", "take", "write", "written KiB", "parts", "round s")
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" * len(heads))
    for devices, blocks in zip(arguments.devices, arguments.blocks, strict=True):
        for layout in ("blocks", "depth", "data-parallel", "single", "auto"):
            for resource in ("airtime", "ingress"):
                made = Settings(layout=layout, rows=16, resource=resource, uplink_bits_per_s=1e9 if resource == "ingress" else 0.0)
                print(_row(made, devices, blocks, arguments.repeats))
    return 0


def _row(settings: Settings, devices: int, blocks: int, repeats: int) -> str:
    fleet = tuple(_device(number) for number in range(devices))
    job = _job(settings, blocks)
    job.figures = _figures(devices, blocks)
    text = records.dump_machine(job)
    opened = [records.load_machine(text) for _ in range(repeats)]
    commands = [command for one in opened for command in one.handle(machine.Offered(fleet), 3.0)]
    requests = [command.request for command in commands if isinstance(command, machine.PlanRound)]
    fresh = [records.load_machine(text) for _ in range(repeats)]
    open_ms = _median_ms([partial(one.handle, machine.Offered(fleet), 3.0) for one in fresh])
    plan_ms = _median_ms([lambda: planning.plan_round(requests[0])] * repeats)
    plan = planning.plan_round(requests[0])
    if not isinstance(plan, RoundPlan):
        raise SystemExit(f"a plan was expected: {plan}")
    answer = machine.Planned(1, plan)
    take_ms = _median_ms([partial(one.handle, answer, 4.0) for one in opened])
    write_ms = _median_ms([lambda: records.dump_machine(opened[0])] * repeats)
    size_kib = len(records.dump_machine(opened[0])) / 1024
    times = (f"{value:.1f}" for value in (plan_ms, open_ms, take_ms, write_ms))
    cells = (f"{devices} x {blocks}", settings.layout, settings.resource, *times)
    return "| " + " | ".join((*cells, f"{size_kib:.0f}", str(len(plan.parts)), f"{plan.round_s:.1f}")) + " |"


def _median_ms(calls: list[Callable[[], object]]) -> float:
    calls[0]()  # scipy is loaded by the first
    taken: list[float] = []
    for call in calls[1:]:
        began_s = time.process_time()
        call()
        taken.append(time.process_time() - began_s)
    return statistics.median(taken) * 1e3


def _job(settings: Settings, blocks: int) -> machine.JobMachine:
    plan = machine.JobPlan(
        job_id="job",
        rounds=100,
        minimum=1,
        per_round=0,
        quorum=0.5,
        deadline_s=0.0,
        wait_s=0.0,
        seed=0,
        evaluation="none",
        evaluate_every=1,
        metric="accuracy",
        patience=0,
        min_delta=0.0,
        absent_grace_s=15.0,
        planning=settings,
    )
    job = machine.JobMachine(plan)
    table = tuple(_block(layer) for layer in range(blocks - 1, -1, -1))
    job.handle(machine.Started(), 1.0)
    job.handle(machine.PreparedEvent(Prepared(Blob("0" * 64, 4 * VALUES * blocks), "0" * 64, blocks=table)), 2.0)
    return job


def _block(layer: int) -> DepthBlock:
    return DepthBlock(f"layer.{layer}", tuple(f"base_model.model.roberta.encoder.layer.{layer}.{name}" for name in NAMES), VALUES)


def _device(number: int) -> Candidate:
    """Solo links 4 times apart."""
    up = 10e6 * 4.0 ** ((number * 7 % 10) / 9)
    return Candidate(f"{number:032x}", f"device-{number}", link=LinkFigures(up, 1e8, 0.01, "measured"))


def _figures(devices: int, blocks: int) -> dict[str, DeviceFigures]:
    """Computing 4 times apart; memory for half of the blocks or more."""
    rng = np.random.default_rng(1)
    found: dict[str, DeviceFigures] = {}
    for number in range(devices):
        first, held = float(rng.uniform(0.5, 2.0)), int(rng.integers(blocks // 2, 2 * blocks))
        step_s = tuple(float(f"{first * (1 + 0.02 * depth):.6g}") for depth in range(blocks))
        step_bytes = tuple(20 * MIB * (depth + 1) for depth in range(blocks))
        found[f"{number:032x}"] = DeviceFigures(16, step_s, step_bytes, 200 * MIB, (200 + 20 * held) * MIB)
    return found


if __name__ == "__main__":
    sys.exit(main())
