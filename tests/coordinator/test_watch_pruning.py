"""A device whose memory chose its arm for it is named to whoever watches or reads the report."""

from __future__ import annotations

import io

from rich.console import Console

from fleetune.coordinator import report, watch
from fleetune.v1 import control_pb2 as pb
from support.job_views import START_UNIX_S, committed, job

NOTE = "short of memory: this arm needs about 1.9 GiB, 800 MiB may be taken"


def noted(rounds: int) -> pb.JobView:
    history = [committed(number) for number in range(1, rounds + 1)]
    for item in history:
        item.tasks[0].pruning.note = NOTE
        item.tasks[0].pruning.rank = 2
    return job(history=history, rounds=rounds, state=pb.JOB_STATE_COMPLETED)


def said(view: pb.JobView) -> str:
    console = Console(width=120, file=io.StringIO(), record=True, color_system=None)
    console.print(report.report(view, now_unix_s=START_UNIX_S + 99, width=120))
    return console.export_text()


def test_it_is_told_when_the_round_begins() -> None:
    view = noted(1)
    lines = watch.Announcer().lines(view)
    assert f"round 1: {view.history[0].tasks[0].device_name}: {NOTE}" in lines


def test_the_report_names_each_device_once() -> None:
    view = noted(3)
    text = said(view)
    assert text.count(NOTE) == 1
    assert f"round 3: {view.history[0].tasks[0].device_name}: {NOTE}" in text
    assert "memory chose" not in said(job(history=[committed(1)], rounds=1, state=pb.JOB_STATE_COMPLETED))
