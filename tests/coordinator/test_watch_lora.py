"""How far a round's adapter is from the exact mean, for those who watch."""

from __future__ import annotations

import io

from rich.console import Console

from fleetune.coordinator import report, watch
from fleetune.v1 import control_pb2 as pb
from support.job_views import START_UNIX_S, committed, job


def finished(*errors: float) -> pb.JobView:
    history = [committed(number) for number in range(1, len(errors) + 1)]
    for item, error in zip(history, errors, strict=True):
        item.fold_metrics.add(name="aggregation_error", value=error)
    return job(history=history, rounds=len(errors), state=pb.JOB_STATE_COMPLETED)


def test_it_is_told_with_the_round() -> None:
    lines = watch.Announcer().lines(finished(0.0123))
    assert any("committed" in line and "aggregation error 1.2%" in line for line in lines)
    assert not any("aggregation" in line for line in watch.Announcer().lines(finished()))


def test_the_report_tells_the_last_and_the_largest() -> None:
    console = Console(width=100, file=io.StringIO(), record=True, color_system=None)
    console.print(report.report(finished(0.01, 0.25, 0.02), now_unix_s=START_UNIX_S + 99, width=100))
    text = " ".join(console.export_text().split())
    assert "aggregation error 2.0% of the exact mean in the last round; at most 25.0%, in round 2" in text
