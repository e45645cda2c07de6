"""Texts from agents are made harmless before they are shown."""

from __future__ import annotations

from fleetune.coordinator.rpc import convert
from fleetune.v1 import fleet_pb2, messages_pb2


def test_what_is_shown_on_one_line_stays_on_one() -> None:
    hello = fleet_pb2.Hello()
    hello.availability.reason = "on battery\nlevel=error forged\x1b[31m"
    assert convert.greeting(hello, "").reason == "on battery?level=error forged?[31m"
    assert convert.failure(messages_pb2.Failure(stage="train\n", message="two\nlines")).stage == "train?"


def test_messages_of_failures_keep_their_lines() -> None:
    assert convert.failure(messages_pb2.Failure(message="two\nlines\x00")).message == "two\nlines?"
