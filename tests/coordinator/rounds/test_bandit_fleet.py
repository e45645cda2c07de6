"""A bandit on each of 80 simulated devices against one fixed arm for all."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fleetune import sparsity
from fleetune.coordinator.rounds import bandit
from fleetune.coordinator.rounds.bandit import Arm, Bandit, Costs, Result, Settings

ROUNDS = 100
STEPS = 40
TARGET = 0.5
SETTINGS = Settings(rank_min=2, rank_max=32)
# As in the paper's fleet: many slow boards, some middling, few fast; seconds of a round's steps at no sparsity and rank 0.
CLASSES = ((30, 60.0, 8e9), (40, 25.0, 8e9), (10, 9.0, 32e9))


@dataclass
class Simulated:
    """A device of the synthetic fleet; `room` is how much its adapter still has to learn."""

    round_s: float
    memory: float
    speed: float = 1.0
    link: float = 1e6
    sparsity: float = 0.0
    loss: float = 2.0

    def costs(self) -> Costs:
        step_s = self.round_s * self.speed / STEPS
        return Costs(step_s, 0.15, 0.004 * step_s, 1.0, 1.2e5, self.link, self.link, 3e9, 2e9, 2e7)

    def after(self, pace: float) -> float:
        return sparsity.round_of(self.sparsity, pace, TARGET, STEPS).after

    def cheapest_s(self) -> float:
        return bandit.predicted_s(self.costs(), STEPS, self.after(1.0), SETTINGS.rank_min)


def learned(device: Simulated, arm: Arm) -> float:
    """Share of the loss that a round takes away: more with rank, the less the more there is; less where much was cut at once, which
    higher ranks make good in part. Synthetic: the shape is what matters, not the numbers."""
    capacity = 1.0 - math.exp(-arm.rank / 6.0)
    harm = 0.35 * (arm.pace if device.sparsity < TARGET - 1e-9 else 0.0) ** 2 * (1.0 - 0.5 * capacity)
    return 0.05 * max(0.0, capacity - harm)


@dataclass(frozen=True)
class Played:
    seconds: float
    quality: float
    sparsity: float


Choose = Callable[[int, int, Simulated, float, float], Arm]


def play(seed: int, choose: Choose, hear: Callable[[int, int, float], None] = lambda *told: None) -> Played:
    draw = random.Random(seed)
    fleet = [Simulated(round_s, memory) for number, round_s, memory in CLASSES for _ in range(number)]
    total_s, mean_s, qualities = 0.0, 0.0, []
    for number in range(1, ROUNDS + 1):
        for device in fleet:
            if number % 20 == 1:
                device.speed = draw.choice((0.6, 0.8, 1.0, 1.4))  # another power mode
            device.link = draw.uniform(1e6, 30e6) / 8
        results: list[tuple[Result, float]] = []
        slowest_s = max(device.cheapest_s() for device in fleet)
        for place, device in enumerate(fleet):
            arm = choose(place, number, device, mean_s, slowest_s)
            plan = sparsity.round_of(device.sparsity, arm.pace, TARGET, STEPS)
            seconds = bandit.predicted_s(device.costs(), STEPS, plan.after, arm.rank) * draw.uniform(0.97, 1.03)
            share = learned(device, arm)
            before, device.loss = device.loss, 0.2 + (device.loss - 0.2) * (1.0 - share)
            results.append((Result(before, device.loss, plan.after - plan.before, math.sqrt(arm.rank), seconds), share))
            device.sparsity = plan.after
        total_s += max(result.seconds for result, _ in results)
        mean_s = statistics.fmean(result.seconds for result, _ in results)
        median_norm = statistics.median(result.update_norm for result, _ in results)
        for place, (result, share) in enumerate(results):
            # Beside what the fleet gained in this round, so that a reward means the same early and late.
            reference = 2.0 * statistics.fmean((r.loss_before - r.loss_after) / r.loss_before for r, _ in results)
            hear(place, number, bandit.reward(result, reference, sparsity.STEP_MAX, median_norm, mean_s))
            qualities.append(share)
    return Played(total_s, statistics.fmean(qualities), statistics.fmean(device.sparsity for device in fleet))


def fixed(seed: int) -> Played:
    middle = Arm(0.5, 8, 0.5, 0.5)
    return play(seed, lambda *asked: middle)


def guided(seed: int) -> Played:
    count = sum(number for number, _, _ in CLASSES)
    states = [Bandit(SETTINGS, seed=1000 * seed + place) for place in range(count)]

    def choose(place: int, number: int, device: Simulated, mean_s: float, slowest_s: float) -> Arm:
        if number == 1:
            states[place] = bandit.give(states[place], "it", number, bandit.calibration(SETTINGS))
            return bandit.calibration(SETTINGS)

        limit_s = bandit.time_limit_s(device.cheapest_s(), mean_s, slowest_s)
        box = bandit.feasible_box(SETTINGS, bandit.within_limits(device.costs(), STEPS, device.after, limit_s, device.memory))
        if box is None:
            return bandit.cheapest(SETTINGS)
        states[place], arm = bandit.ask(states[place], "it", number, box)
        return arm

    def hear(place: int, number: int, reward: float) -> None:
        states[place] = bandit.tell(states[place], "it", number, reward)

    return play(seed, choose, hear)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_bandit_on_each_device_beats_one_fixed_arm_for_all(seed: int) -> None:
    one, many = fixed(seed), guided(seed)
    assert many.seconds <= 0.95 * one.seconds
    assert many.quality >= one.quality
    assert many.sparsity >= TARGET - 0.03
