"""What is left of adapters that lose ranks, for those who watch."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fleetune.coordinator import watch
from fleetune.v1 import control_pb2 as pb
from support.job_views import committed, job


def ranked(*left: tuple[int, int]) -> pb.JobView:
    history = [committed(number) for number in range(1, len(left) + 1)]
    for item, (ranks, modules) in zip(history, left, strict=True):
        item.fold_metrics.add(name="triplets", value=ranks)
        item.fold_metrics.add(name="modules", value=modules)
    return job(history=history, rounds=max(1, len(left)))


def text_of(view: pb.JobView, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(watch.rounds_table(view, width=width))
    return console.export_text()


def test_it_is_told_with_the_round() -> None:
    lines = watch.Announcer().lines(ranked((96, 12), (1, 1)))
    assert any("round 1/2 committed" in line and "96 ranks in 12 modules" in line for line in lines)
    assert any("1 rank in 1 module" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_rounds_has_a_column_for_it_and_is_no_wider_than_the_terminal(width: int) -> None:
    text = text_of(ranked((1296, 72), (324, 9)), width)
    assert "ranks" in text and "modules" in text
    assert "1,296" in text and "324" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_other_jobs_have_no_such_column() -> None:
    plain = job(history=[committed(1)], rounds=1)
    assert "modules" not in text_of(plain, 120)
    assert not watch.ranks_text(plain.history[0])
