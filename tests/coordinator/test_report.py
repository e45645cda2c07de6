"""What `fleetune report` says of a job."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fleetune.coordinator import report
from fleetune.v1 import control_pb2 as pb
from fleetune.v1 import messages_pb2
from support import job_views
from support.job_views import committed, job, task

NO_MEMORY = messages_pb2.Failure(
    kind=messages_pb2.FAILURE_KIND_OUT_OF_MEMORY, stage="train", message="No memory.", traceback="Trace of barn"
)


def a_job() -> pb.JobView:
    rounds = [
        committed(1, [task("attic", samples=300), task("barn", samples=100)], accuracy=0.5),
        committed(2, [task("attic", samples=300), task("barn", pb.DEVICE_TASK_STATE_FAILED, failure=NO_MEMORY)], accuracy=0.7),
        committed(3, [task("attic", samples=300), task("barn", pb.DEVICE_TASK_STATE_MISSED)], accuracy=0.6),
    ]
    view = job(pb.JOB_STATE_FAILED, history=rounds, best_round=2, initial_accuracy=0.1, ended_after_s=40, message="barn failed twice.")
    view.failure.CopyFrom(NO_MEMORY)
    view.failed_device = "barn"
    view.adapter_folder = "/srv/fleetune/jobs/7f3a21c9/rounds/0003"
    return view


def printed(view: pb.JobView, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(report.report(view, now_unix_s=job_views.START_UNIX_S + 50, width=width))
    return console.export_text()


def test_shares_count_what_each_device_gave_and_what_it_did_not() -> None:
    attic, barn = report.device_shares(a_job())
    assert (attic.device, attic.samples, attic.share, attic.rounds_done) == ("attic", 900, 0.9, 3)
    assert (barn.samples, barn.rounds_done, barn.rounds_asked, barn.failed, barn.missed) == (100, 1, 3, 1, 1)


def test_evaluations_are_no_shares() -> None:
    view = job(history=[committed(1, [task("attic", samples=9), task("attic", samples=5, kind=messages_pb2.TASK_KIND_EVALUATE)])])
    (attic,) = report.device_shares(view)
    assert (attic.rounds_asked, attic.samples) == (1, 9)


def test_a_report_has_accuracy_best_round_failures_and_the_traceback() -> None:
    text = printed(a_job())
    assert "10.0% before, 60.0% after" in text
    assert "2 (accuracy 70.0%)" in text
    assert "round 2: barn failed (train): No memory." in text
    assert "round 3: barn missed the round" in text
    assert "Trace of barn" in text
    assert "fleetune export 7f3a21c9 DIR" in " ".join(text.split())


def test_a_job_before_its_first_round_has_a_report() -> None:
    assert "0 of 10 committed" in printed(job(pb.JOB_STATE_QUEUED))


def test_the_report_in_json_has_shares_and_failures_and_is_json() -> None:
    document = json.loads(json.dumps(report.report_json(a_job()), allow_nan=False))
    assert [item["device"] for item in document["devices"]] == ["attic", "barn"]
    assert document["failures"][0]["kind"] == "out_of_memory"
    assert document["history"][0]["metrics"]["accuracy"] == 0.5
    assert document["state"] == "failed"


def test_a_report_of_a_very_long_job_says_since_when_it_knows_the_devices_parts() -> None:
    view = job(pb.JOB_STATE_COMPLETED, history=[committed(number) for number in (1, 2, 3)], ended_after_s=9)
    assert "is told from round" not in printed(view)
    view.tasks_since_round = 3
    assert "what each device did is told from round 3 on" in printed(view)


def test_a_report_of_planned_rounds_sets_what_was_predicted_against_what_it_took() -> None:
    view = job_views.job(pb.JOB_STATE_COMPLETED, history=[job_views.planned(1), job_views.planned(2, actual_s=50.0)], ended_after_s=90)
    slow, fast = sorted(report.device_plans(view), key=lambda one: one.device, reverse=True)
    assert (slow.device, slow.rounds_planned, slow.predicted_s, slow.actual_s) == ("kitchen-pi", 2, 40.0, 47.0)
    assert slow.error == pytest.approx((0.1 + 0.25) / 2)
    assert fast.error == 0.0
    assert report.round_errors(view) == pytest.approx([0.1, 0.25])
    plans = report.report_json(view)["plans"]
    assert isinstance(plans, dict)
    assert plans["round_error"] == pytest.approx(0.175)
    assert "plans" not in report.report_json(job_views.job(pb.JOB_STATE_COMPLETED, history=[job_views.committed(1)]))
