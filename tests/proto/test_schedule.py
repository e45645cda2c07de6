"""Learning rates by hand."""

from __future__ import annotations

from functools import partial

import pytest

from fleetune.errors import UnsupportedError
from fleetune.schedule import learning_rate


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, [2.0, 2.0, 2.0, 2.0]),
        ("constant", 2, [1.0, 2.0, 2.0, 2.0]),
        ("linear", 0, [2.0, 1.5, 1.0, 0.5]),
        ("cosine", 0, [2.0, 1.7071, 1.0, 0.2929]),
        ("cosine", 2, [1.0, 2.0, 2.0, 1.0]),
    ],
)
def test_rates_of_a_job_of_four_steps(name: str, warmup: int, expected: list[float]) -> None:
    rate = partial(learning_rate, peak=2.0, name=name, warmup_steps=warmup, total_steps=4, offset=0)
    assert [rate(step) for step in range(4)] == pytest.approx(expected, abs=1e-4)


def test_a_later_round_goes_on_where_the_earlier_ended() -> None:
    whole = [learning_rate(step, peak=1.0, name="cosine", warmup_steps=3, total_steps=8, offset=0) for step in range(8)]
    later = [learning_rate(step, peak=1.0, name="cosine", warmup_steps=3, total_steps=8, offset=4) for step in range(4)]
    assert whole[4:] == later


def test_steps_after_the_schedules_end_have_no_rate() -> None:
    assert learning_rate(9, peak=1.0, name="linear", warmup_steps=0, total_steps=4, offset=0) == 0.0


def test_an_unknown_schedule_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="constant, linear, cosine"):
        learning_rate(0, peak=1.0, name="step", warmup_steps=0, total_steps=4, offset=0)
