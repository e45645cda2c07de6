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
