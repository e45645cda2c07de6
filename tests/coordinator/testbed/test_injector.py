"""The injector: acts are done in their order and told, and what is open is undone when it ends early."""

from __future__ import annotations

import asyncio
import threading
from typing import cast

import pytest

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import testbedfile
from fleetune.coordinator.testbed.backend import Backend
from fleetune.coordinator.testbed.injector import Injector
from fleetune.coordinator.testbed.record import Acted
from fleetune.coordinator.testbed.schedule import Act

SPEC = testbedfile.parse('[[device]]\nkind = "pi4"\ncount = 2\n')


class Boards:
    """Remembers what was done to whom."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    async def act_begun(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.begun.wait, 10)

    def __getattr__(self, verb: str) -> object:
        def do(member: str, *_rates: float | None) -> None:
            self.begun.set()
            self.go_on.wait(10)
            if verb == "fill_disk":
                raise MachineError("the disk is too large.")
            self.done.append((verb, member))

        return do


def _injector(boards: Boards, acts: list[Act], heard: list[Acted]) -> Injector:
    return Injector(cast("Backend", boards), SPEC, acts, heard.append)


@pytest.mark.asyncio
async def test_acts_are_done_in_order_and_told() -> None:
    boards, heard = Boards(), list[Acted]()
    injector = _injector(boards, [Act(0.0, "pi4-1", "cut"), Act(0.0, "pi4-1", "mend"), Act(0.0, "pi4-2", "throttle", 1.5)], heard)
    await injector.run()
    await injector.undo()
    injector.close()
    assert [item for item in boards.done if item[1] == "pi4-1"] == [("cut", "pi4-1"), ("mend", "pi4-1")]
    assert [(told.member, told.act) for told in heard if told.member == "pi4-2"] == [("pi4-2", "throttle"), ("pi4-2", "unthrottle")]
    assert "1.5 Mbit/s up" in next(told.text for told in heard if told.act == "throttle")


@pytest.mark.asyncio
async def test_what_is_open_is_undone_when_the_run_is_cut_short() -> None:
    boards, both = Boards(), asyncio.Event()
    heard: list[Acted] = []

    def hear(told: Acted) -> None:
        heard.append(told)
        if len(heard) == 2:
            both.set()

    acts = [Act(0.0, "pi4-1", "pause"), Act(0.0, "pi4-2", "kill"), Act(3600.0, "pi4-1", "resume")]
    injector = Injector(cast("Backend", boards), SPEC, acts, hear)
    running = asyncio.ensure_future(injector.run())
    await both.wait()
    running.cancel()
    await asyncio.wait({running})
    await injector.undo()
    injector.close()
    assert set(boards.done[2:]) == {("resume", "pi4-1"), ("restart", "pi4-2")}


@pytest.mark.asyncio
async def test_an_act_under_way_is_done_before_it_is_undone() -> None:
    boards, heard = Boards(), list[Acted]()
    boards.go_on.clear()
    injector = _injector(boards, [Act(0.0, "pi4-1", "cut")], heard)
    running = asyncio.ensure_future(injector.run())
    await boards.act_begun()
    running.cancel()
    await asyncio.sleep(0)
    boards.go_on.set()
    await asyncio.wait({running})
    await injector.undo()
    injector.close()
    assert boards.done == [("cut", "pi4-1"), ("mend", "pi4-1")]
    assert [told.act for told in heard] == ["cut", "mend"]


@pytest.mark.asyncio
async def test_what_the_machine_cannot_do_is_noted_and_the_rest_goes_on() -> None:
    boards, heard = Boards(), list[Acted]()
    injector = _injector(boards, [Act(0.0, "pi4-1", "fill_disk"), Act(0.0, "pi4-2", "kill")], heard)
    await injector.run()
    await injector.undo()
    injector.close()
    assert injector.notes == ["pi4-1: fill_disk could not be done: the disk is too large."]
    assert ("kill", "pi4-2") in boards.done
