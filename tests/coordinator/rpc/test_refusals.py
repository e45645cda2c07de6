"""What is told of refusals: each kind at once and once a minute with its number, never more kinds than there is memory for."""

from __future__ import annotations

import asyncio
import logging

import pytest

from fleetune.coordinator.rpc import refusals
from fleetune.coordinator.rpc.refusals import Kind, Refusals


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def a_minute_later(told: Refusals, clock: Clock) -> None:
    """As the loop's timer would do it."""
    clock.now_s += refusals.TELL_S
    assert told._timer is not None
    told._timer.cancel()
    told._sum_up()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "fleetune.gate"]
    caplog.clear()
    return found


async def test_refusals_are_counted_and_their_memory_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    told = Refusals(clock)
    caplog.set_level(logging.WARNING)
    assert [told.note("agent oak", "/x", "no") for _ in range(1000)] == [True] + [False] * 999
    for number in range(3 * refusals.KINDS_KEPT):
        told.note(f"agent a{number}", "/x", "no")
    told.note("ipv4:1.2.3.4:50", "/x", "no")
    assert len(told._told) <= refusals.KINDS_KEPT + 1
    assert len(lines(caplog)) == refusals.KINDS_KEPT + 1
    a_minute_later(told, clock)
    assert any("agent oak" in line and "another 999 times" in line for line in lines(caplog))
    a_minute_later(told, clock)
    assert told._told == {}
    assert told._timer is None


async def test_one_address_is_one_caller_whatever_its_port(caplog: pytest.LogCaptureFixture) -> None:
    told = Refusals(Clock())
    assert [told.note(f"ipv4:192.0.2.1:{port}", "/x", "no") for port in (1, 2, 3)] == [True, False, False]
    assert lines(caplog) == ["refused caller='ipv4:192.0.2.1' method=/x reason='no'"]
    assert told._timer is not None
    told._timer.cancel()


async def test_words_that_differ_are_told_once_and_counted_as_one_kind(caplog: pytest.LogCaptureFixture) -> None:
    clock, more = Clock(), asyncio.Queue[tuple[Kind, int]]()
    told = Refusals(clock, lambda kind, count: more.put_nowait((kind, count)))
    assert [told.note("192.0.2.1", "/join", "a bad name", f"the name {name!r} is bad") for name in "abc"] == [True, False, False]
    assert lines(caplog) == ["refused caller='192.0.2.1' method=/join reason=\"the name 'a' is bad\""]
    a_minute_later(told, clock)
    assert lines(caplog) == ["refused caller='192.0.2.1' method=/join reason='a bad name' another 2 times in 60 s"]
    assert more.get_nowait() == (Kind("192.0.2.1", "/join", "a bad name"), 2)
    a_minute_later(told, clock)
    assert more.empty()
    assert told._timer is None
