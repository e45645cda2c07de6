"""A device's class of hardware is what its owner says, else what the machine says of itself."""

from __future__ import annotations

import pytest

from fleetune.coordinator.registry import Needs, Registry, Session
from fleetune.coordinator.rpc import convert
from fleetune.v1 import fleet_pb2

BOARD = fleet_pb2.Profile(machine="aarch64", board="Raspberry Pi 5", accelerator="cpu")
GPU = fleet_pb2.Profile(machine="x86_64", accelerator="cuda", accelerator_name="NVIDIA H100")


@pytest.mark.parametrize(
    ("profile", "tags", "hardware"),
    [
        (BOARD, [], "Raspberry Pi 5"),
        (GPU, ["lab"], "NVIDIA H100"),
        (fleet_pb2.Profile(machine="x86_64"), ["class:"], "x86_64"),
        (BOARD, ["class:kitchen", "lab"], "kitchen"),
        (fleet_pb2.Profile(), [], "unknown"),
        (fleet_pb2.Profile(board="two\nlines"), [], "two?lines"),
    ],
)
def test_the_first_word_that_tells_it_counts(profile: fleet_pb2.Profile, tags: list[str], hardware: str) -> None:
    assert convert.hardware(fleet_pb2.Hello(profile=profile, tags=tags)) == hardware


def test_a_candidate_carries_its_class() -> None:
    registry = Registry(10.0)
    hello = fleet_pb2.Hello(device_id="d", device_name="n", instance_id="i", methods=["fedspine"], profile=BOARD)
    hello.availability.accepts_tasks = True
    assert isinstance(registry.admit(convert.greeting(hello, "here"), 0.0), Session)
    (candidate,) = registry.candidates(Needs("fedspine", "", frozenset()), set(), 1.0)
    assert candidate.hardware == "Raspberry Pi 5"
