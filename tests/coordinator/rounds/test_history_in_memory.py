"""What memory holds of a job's rounds stays the same however long the job runs."""

from __future__ import annotations

import pytest

from fleetune.coordinator.domain import Blob, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import needs
from fleetune.coordinator.rounds.history import RECENT_ROUNDS, TIMED_ROUNDS, History
from support.machines import Desk, blob


def entry(number: int, seconds: float = 2.0, devices: int = 3) -> RoundEntry:
    made = RoundEntry(number, "committed", 10.0 * number, start_state=Blob("0" * 64, 7), state=blob(f"s{number}"))
    made.ended_unix_s = made.started_unix_s + seconds
    for device in range(devices):
        task = TaskEntry(f"job/{number}/d{device}/train", f"d{device}", f"n{device}", "train", device, "done", update=Update(blob("u"), 1))
        made.tasks[task.task_id] = task
    return made


def test_the_last_rounds_and_the_kept_ones_stay() -> None:
    history = History()
    for number in range(1, 301):
        history.add(entry(number), {7, number})
    assert [item.number for item in history] == [7, *range(301 - RECENT_ROUNDS, 301)]
    assert (history.committed, len(history)) == (300, RECENT_ROUNDS + 1)
    assert history.get(8) is None and history.last is history.get(300)


def test_sums_are_over_all_rounds() -> None:
    history = History.of(entry(number) for number in range(1, 101))
    assert (history.upload_bytes, history.download_bytes) == (100 * 3 * 100, 100 * 3 * 7)


def test_the_length_of_a_round_is_that_of_the_last_ones() -> None:
    assert History().median_s is None
    history = History.of([*(entry(n, 100.0) for n in range(1, 50)), *(entry(49 + n, 3.0) for n in range(1, TIMED_ROUNDS + 1))])
    assert history.median_s == pytest.approx(3.0)


def test_the_time_in_which_devices_were_measured_is_not_part_of_a_round_s_length() -> None:
    planned = entry(1, 90.0)
    planned.training_since_unix_s = planned.started_unix_s + 80.0
    assert History.of([planned]).median_s == pytest.approx(10.0)


def test_a_machine_of_hundreds_of_rounds_holds_no_more_than_one_of_a_few() -> None:
    """The machine is written down as a whole with every event, so it must not grow either."""
    desk = Desk(rounds=400, evaluation="devices", metric="loss", update_norm_bound=3.0)
    sizes: list[int] = []
    for number in range(1, 301):
        desk.open("a", "b", *("c" if number < 4 else ""))
        if number < 4:
            desk.fail("c")
        for name in "ab":
            desk.update(name, metrics={"loss": 1.0})
        desk.fold("a", "b")
        for name in "ab":
            desk.measured(name, loss=1.0 / number)
        sizes.append(_elements(desk.machine.__dict__))
    assert desk.machine.committed == 300
    assert sizes[-1] <= sizes[10]
    assert needs.kept_numbers(desk.machine, 3) == {298, 299, 300}


def _elements(value: object) -> int:
    if isinstance(value, dict):
        return sum(_elements(item) for item in value.values())
    if isinstance(value, (list, set, tuple)):
        return sum(_elements(item) for item in value)
    return 1
