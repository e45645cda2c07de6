"""What is free for training, and which bound says so."""

from __future__ import annotations

import pytest

from fleetune.agent.probe.cgroup import MemoryGroup
from fleetune.agent.probe.memory import Room, tightest_room, training_room


@pytest.mark.parametrize(
    ("groups", "address_space", "configured", "room"),
    [
        ([], None, None, Room(100, "machine")),
        ([MemoryGroup(80, 30), MemoryGroup(200, 20)], None, None, Room(50, "control group")),
        ([MemoryGroup(80, 90)], None, None, Room(0, "control group")),
        ([MemoryGroup(80, 30)], 40, None, Room(40, "address space")),
        ([MemoryGroup(80, 30)], 40, 20, Room(20, "configured")),
    ],
)
def test_the_smallest_bound_counts_and_has_a_name(
    groups: list[MemoryGroup], address_space: int | None, configured: int | None, room: Room
) -> None:
    assert tightest_room(100, groups, address_space, configured) == room


def test_this_machine_has_some() -> None:
    assert training_room().free_bytes > 0
