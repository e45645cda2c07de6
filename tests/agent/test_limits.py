"""When the owner lets the device train."""

from __future__ import annotations

from datetime import datetime, time, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.agent.limits import Facts, HoursError, Limits, availability, hours_window, keep_warm_s

NOON = datetime(2026, 3, 1, 12, 0)
GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "21:59"]),
        ("09:30-17:00", ["09:30", "16:59"], ["09:29", "17:00", "00:00"]),
        ("20:00-24:00", ["20:00", "23:59"], ["00:00", "19:59"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59"], []),
        ("7:00 - 8:00", ["07:30"], ["08:00"]),
    ],
)
def test_a_window_holds_its_start_and_not_its_end(text: str, inside: list[str], outside: list[str]) -> None:
    window = hours_window(text)
    assert all(window.holds(time.fromisoformat(moment)) for moment in inside)
    assert not any(window.holds(time.fromisoformat(moment)) for moment in outside)


@pytest.mark.parametrize(
    "text", ["", "22:00", "22-6", "25:00-06:00", "24:01-06:00", "22:60-06:00", "22:00-06:00-07:00", "a:b-c:d", "٢٢:٠٠-٠٦:٠٠"]
)
def test_what_is_no_window_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(HoursError, match="22:00-06:00"):
        hours_window(text)


@settings(deadline=None)
@given(st.times(), st.times(), st.times())
def test_a_window_and_its_reverse_share_no_moment_and_miss_none(start: time, end: time, moment: time) -> None:
    start, end = start.replace(second=0, microsecond=0), end.replace(second=0, microsecond=0)
    if start == end:
        return
    there = hours_window(f"{start:%H:%M}-{end:%H:%M}")
    back = hours_window(f"{end:%H:%M}-{start:%H:%M}")
    assert there.holds(moment) != back.holds(moment)


def test_without_limits_a_device_always_trains_even_if_nothing_can_be_read() -> None:
    assert availability(Limits(), Facts(), NOON) == (True, "")


def test_hours_are_any_of_several_windows() -> None:
    limits = Limits(hours=(hours_window("22:00-06:00"), hours_window("12:00-13:00")))
    assert availability(limits, Facts(), NOON) == (True, "")
    assert availability(limits, Facts(), NOON + timedelta(hours=1)) == (False, "outside 22:00-06:00, 12:00-13:00")


@pytest.mark.parametrize(("on_mains", "reason"), [(True, ""), (False, "on battery"), (None, "power supply cannot be read")])
def test_mains_only_needs_mains_that_are_seen(on_mains: bool | None, reason: str) -> None:
    assert availability(Limits(on_mains_only=True), Facts(on_mains=on_mains), NOON) == (not reason, reason)


@pytest.mark.parametrize(("load", "reason"), [(20.0, ""), (20.5, "in use (20 % load by others)"), (None, "load not measured yet")])
def test_idle_only_needs_a_measured_low_load(load: float | None, reason: str) -> None:
    assert availability(Limits(idle_only=True), Facts(others_cpu_percent=load), NOON) == (not reason, reason)


def test_a_metered_link_is_left_alone_unless_the_owner_allows_it() -> None:
    facts = Facts(interfaces=("wwan0", "eth0"))
    assert availability(Limits(), facts, NOON) == (False, "metered link (wwan0)")
    assert availability(Limits(allow_metered=True), facts, NOON) == (True, "")
    assert availability(Limits(metered_interfaces=("*",)), facts, NOON) == (False, "metered link (eth0, wwan0)")


def test_all_reasons_are_told_together() -> None:
    limits = Limits(on_mains_only=True, idle_only=True, hours=(hours_window("1:00-2:00"),))
    facts = Facts(on_mains=False, others_cpu_percent=90.0, interfaces=("ppp0",))
    assert availability(limits, facts, NOON)[1] == "outside 1:00-2:00; on battery; metered link (ppp0); in use (90 % load by others)"


def test_a_model_stays_loaded_for_the_shorter_wish_and_never_where_memory_is_short() -> None:
    assert keep_warm_s(120, 300, 8 * GIB, 4 * GIB) == 120
    assert keep_warm_s(120, 30, 8 * GIB, 4 * GIB) == 30
    assert keep_warm_s(120, 300, 1 * GIB, 1 * GIB) == 0
    assert keep_warm_s(120, 300, 8 * GIB, GIB) == 0
    assert keep_warm_s(120, 300, int(1.85 * GIB), GIB) == 120
