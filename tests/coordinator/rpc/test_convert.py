"""Texts from agents are made harmless before they are shown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.domain import DeviceFigures, LinkFigures
from fleetune.coordinator.rpc import convert
from fleetune.v1 import fleet_pb2, messages_pb2


def test_what_is_shown_on_one_line_stays_on_one() -> None:
    hello = fleet_pb2.Hello()
    hello.availability.reason = "on battery\nlevel=error forged\x1b[31m"
    assert convert.greeting(hello, "").reason == "on battery?level=error forged?[31m"
    assert convert.failure(messages_pb2.Failure(stage="train\n", message="two\nlines")).stage == "train?"


def test_messages_of_failures_keep_their_lines() -> None:
    assert convert.failure(messages_pb2.Failure(message="two\nlines\x00")).message == "two\nlines?"


def test_an_agent_of_minor_0_is_taken_to_have_rows_of_both_kinds() -> None:
    """Its Hello as it was before the two lists."""
    hello = fleet_pb2.Hello(protocol_major=1, device_id="device-old", device_name="old", data_names=["intents", "trec"])
    assert not hello.protocol_minor
    greeting = convert.greeting(hello, "")
    assert greeting.train_data_names == greeting.validation_data_names == greeting.data_names == {"intents", "trec"}


def test_an_agent_that_tells_its_rows_is_believed() -> None:
    hello = fleet_pb2.Hello(data_names=["intents", "trec"], train_data_names=["trec"], validation_data_names=["intents", "trec"])
    greeting = convert.greeting(hello, "")
    assert greeting.train_data_names == {"trec"}
    assert greeting.validation_data_names == {"intents", "trec"}
    only = convert.greeting(fleet_pb2.Hello(data_names=["intents"], validation_data_names=["intents"]), "")
    assert not only.train_data_names
    assert only.validation_data_names == {"intents"}


def told(**changes: object) -> messages_pb2.Figures:
    made = messages_pb2.Figures(batch_rows=8, step_s=[1.0, 2.0], step_bytes=[10, 20], loaded_bytes=5, room_bytes=50, source="measured")
    made.MergeFrom(messages_pb2.Figures(**changes))  # type: ignore[arg-type]  # its own fields
    return made


def test_figures_come_as_they_are() -> None:
    found = convert.figures(told(margin=1.25, ratio=0.9, age_s=3.0))
    assert found == DeviceFigures(8, (1.0, 2.0), (10, 20), 5, 50, source="measured", age_s=3.0, ratio=0.9, margin=1.25)


@pytest.mark.parametrize(
    "message",
    [
        messages_pb2.Figures(),
        messages_pb2.Figures(step_s=[1.0], step_bytes=[1, 2]),
        messages_pb2.Figures(step_s=[1.0] * 513, step_bytes=[1] * 513),
        *(messages_pb2.Figures(step_s=[1.0, wrong], step_bytes=[1, 2]) for wrong in (math.nan, math.inf, -1.0, 0.0, 1e7)),
    ],
)
def test_what_is_no_figures_of_a_model_is_not_taken(message: messages_pb2.Figures) -> None:
    assert convert.figures(message) is None


def test_figures_never_fall_with_depth_and_never_go_beyond_a_machine() -> None:
    wild = messages_pb2.Figures(
        step_s=[2.0, 1.0, 3.00000049],
        step_bytes=[7, 5, 2**63],
        loaded_bytes=2**63,
        margin=math.nan,
        ratio=-3.0,
        flops_per_s=math.inf,
        source="guessed",
        age_s=-1.0,
    )
    found = convert.figures(wild)
    assert found is not None
    assert found.step_s == (2.0, 2.0, 3.0)
    assert found.step_bytes == (7, 7, convert.BYTES_MAX)
    assert (found.batch_rows, found.loaded_bytes, found.margin, found.flops_per_s) == (1, convert.BYTES_MAX, 1.0, convert.RATE_MAX)
    assert (found.source, found.age_s) == ("", 0.0)
    assert convert.figures(convert.figures_message(found)) == found


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.floats(), max_size=6),
    sizes=st.lists(st.integers(0, 2**64 - 1), max_size=6),
    numbers=st.lists(st.floats(), min_size=8, max_size=8),
)
def test_whatever_a_device_tells_can_be_planned_with(steps: list[float], sizes: list[int], numbers: list[float]) -> None:
    names = ("forward_s", "age_s", "ratio", "margin", "flops_per_s", "peak_flops_per_s", "tokens_per_s")
    message = messages_pb2.Figures(step_s=steps, step_bytes=sizes, **dict(zip(names, numbers, strict=False)))  # type: ignore[arg-type]
    found = convert.figures(message)
    assert (found is not None) == (0 < len(steps) == len(sizes) and all(math.isfinite(s) and 0 < s <= convert.STEP_S_MAX for s in steps))
    if found is not None:
        assert list(found.step_s) == sorted(found.step_s)
        assert list(found.step_bytes) == sorted(found.step_bytes)
        assert all(math.isfinite(value) for value in vars(found).values() if isinstance(value, float))
    link = convert.link(messages_pb2.Link(up_bits_per_s=numbers[0], down_bits_per_s=numbers[1], round_trip_s=numbers[2], age_s=numbers[3]))
    assert all(math.isfinite(value) and value >= 0 for value in (link.up_bits_per_s, link.down_bits_per_s, link.round_trip_s, link.age_s))
    assert convert.link(convert.link_message(link)) == link


def test_a_link_of_which_nothing_is_known_stays_unknown() -> None:
    assert convert.link(messages_pb2.Link(metered=True)) == LinkFigures(metered=True)
    assert convert.link(messages_pb2.Link(up_bits_per_s=0.1)).up_bits_per_s == 1000.0
    hello = fleet_pb2.Hello()
    convert.sober(hello)
    assert not hello.HasField("link")
    assert convert.greeting(hello, "").link == LinkFigures()
