"""Measured figures on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.agent.probe import figures
from fleetune.agent.probe.figures import Figures, Key
from fleetune.agent.probe.freshness import RoundTimes

KEY = Key("b" * 64, "r" * 64, 16, "2.9.1", "Raspberry Pi 5", "float32", 4)
FIGURES = Figures(KEY, "measured", 1000.0, {"machine": {"threads": 4}}, RoundTimes().observed(1.0, 2.0))


def test_figures_come_back_as_they_were(tmp_path: Path) -> None:
    figures.save(tmp_path, FIGURES)
    assert figures.load(tmp_path, KEY) == FIGURES
    assert FIGURES.age_s(1060.0) == 60.0


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, base_digest="c" * 64),
        replace(KEY, recipe_digest=""),
        replace(KEY, batch_rows=8),
        replace(KEY, torch_version="2.9.2"),
        replace(KEY, device="Raspberry Pi 4"),
        replace(KEY, dtype="bfloat16"),
        replace(KEY, threads=2),
    ],
)
def test_figures_hold_for_nothing_but_their_key(tmp_path: Path, other: Key) -> None:
    figures.save(tmp_path, FIGURES)
    assert figures.load(tmp_path, other) is None


@pytest.mark.parametrize(
    "spoilt",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        json.dumps({"version": 1, "key": vars(KEY), "source": "guessed", "measured_unix_s": 1, "answer": {}, "rounds": {}}),
        json.dumps({"version": 1, "key": vars(KEY), "source": "measured", "measured_unix_s": "x", "answer": {}, "rounds": {}}),
        json.dumps({"version": 1, "key": vars(KEY), "source": "measured", "measured_unix_s": 1, "answer": {}, "rounds": {"average": 1}}),
    ],
)
def test_a_spoilt_file_is_measured_again(tmp_path: Path, spoilt: str) -> None:
    figures.save(tmp_path, FIGURES).write_text(spoilt)
    assert figures.load(tmp_path, KEY) is None


def test_figures_that_are_not_finite_leave_the_old_ones_and_no_rest(tmp_path: Path) -> None:
    path = figures.save(tmp_path, FIGURES)
    with pytest.raises(ValueError, match="JSON"):
        figures.save(tmp_path, replace(FIGURES, answer={"x": float("nan")}))
    assert figures.load(tmp_path, KEY) == FIGURES
    assert list(path.parent.iterdir()) == [path]
