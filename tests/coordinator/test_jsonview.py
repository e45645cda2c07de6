"""Messages as JSON for scripts."""

from __future__ import annotations

import json

import pytest

from fleetune.coordinator.jsonview import enum_word, message_json
from fleetune.v1 import blob_pb2, control_pb2, messages_pb2


def test_enums_are_words_and_big_integers_are_numbers() -> None:
    view = message_json(control_pb2.JobView(state=control_pb2.JOB_STATE_RUNNING, upload_bytes=1 << 60))
    assert view["state"] == "running"
    assert view["upload_bytes"] == 1 << 60


def test_unset_fields_are_there() -> None:
    view = message_json(control_pb2.JobView())
    assert view["name"] == ""
    assert view["history"] == []
    assert view["current"] is None
    assert view["remaining_s"] is None


def test_metrics_are_an_object_and_nan_is_null() -> None:
    metrics = [messages_pb2.Metric(name="loss", value=float("nan")), messages_pb2.Metric(name="accuracy", value=0.5)]
    view = message_json(messages_pb2.Evaluation(metrics=metrics, rows=3))
    assert view == {"metrics": {"loss": None, "accuracy": 0.5}, "rows": 3}
    json.dumps(view, allow_nan=False)


def test_bytes_stay_out() -> None:
    assert "data" not in message_json(blob_pb2.Chunk(data=b"x"))


@pytest.mark.parametrize(
    ("enum", "value", "word"),
    [("JobState", "JOB_STATE_FAILED", "failed"), ("DeviceTaskState", "DEVICE_TASK_STATE_UNSPECIFIED", "unspecified")],
)
def test_enum_words(enum: str, value: str, word: str) -> None:
    assert enum_word(enum, value) == word
