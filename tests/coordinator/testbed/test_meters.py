"""Counters that are read now and then."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.testbed import records
from fleetune.coordinator.testbed.meters import Meter, meter
from support import testbed_runs as runs


def sent(*counts: int | None) -> Meter:
    lines = [runs.sampled(second, {"attic": runs.sample(0, count)}) for second, count in enumerate(counts)]
    record = records.parse(runs.text([runs.began([]), *lines]), "run.jsonl")
    return meter(record.samples, "attic", lambda sample: sample.sent_bytes, runs.START_UNIX_S)


def test_what_was_counted_before_the_first_look_is_not_of_this_run() -> None:
    assert sent(1000, 1200).total == 200


def test_a_counter_that_nobody_could_read_is_not_known() -> None:
    assert not sent(None, None).known
    assert sent(None, None).total == 0


def test_a_look_that_failed_is_bridged() -> None:
    assert sent(0, None, 100).until(1.0) == 50


def test_before_the_first_look_nothing_was_counted_and_after_the_last_all_of_it() -> None:
    found = sent(0, 100)
    assert (found.until(-5), found.until(99)) == (0, 100)


def test_the_highest_rate_is_that_of_two_looks_next_to_each_other() -> None:
    assert sent(0, 100, 700, 800).fastest() == 600
    assert sent(5).fastest() is None


def test_looks_that_are_too_close_say_nothing_of_a_rate() -> None:
    assert Meter(((0.0, 0.0), (0.1, 50.0), (1.1, 60.0))).fastest() == 10


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_sum_never_shrinks_whatever_restarts_there_are(counts: list[int]) -> None:
    found = sent(*counts)
    sums = [found.until(second / 2) for second in range(2 * len(counts))]
    assert all(before <= after for before, after in itertools.pairwise(sums))
    assert sums[-1] == found.total
