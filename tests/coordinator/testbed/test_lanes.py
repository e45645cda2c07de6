"""What members did when, from samples and acts."""

from __future__ import annotations

import pytest

from fleetune.coordinator.testbed import lanes, records
from fleetune.coordinator.testbed.lanes import Lane
from support import testbed_runs as runs
from support.testbed_runs import Line, acted, sampled

ATTIC = {"attic": runs.sample()}
END = 10.0


def lane(*lines: Line, member: str = "attic", end_s: float = END) -> Lane:
    content = runs.text([runs.began([runs.device("attic")]), *lines, runs.ended(end_s, runs.job_report([]))])
    return next(item for item in lanes.lanes(records.parse(content, "run.jsonl")) if item.member == member)


def told(found: Lane) -> list[tuple[str, float, float]]:
    return [(item.activity, round(item.begin_s, 3), round(item.end_s, 3)) for item in found.stretches]


def steps(*stages: str) -> list[Line]:
    return [sampled(second, ATTIC, stages={"attic": stage} if stage else {}) for second, stage in enumerate(stages)]


def test_a_stage_lasts_until_the_next_sample_says_another() -> None:
    found = lane(*steps("fetching base", "fetching state", "training", "", "uploading"), end_s=5)
    assert told(found) == [("download", 0, 2), ("compute", 2, 3), ("idle", 3, 4), ("upload", 4, 5)]
    assert found.seconds()["download"] == 2


def test_a_task_that_waits_its_turn_is_idle() -> None:
    assert told(lane(*steps("queued", "", "measuring"), end_s=3)) == [("idle", 0, 2), ("measure", 2, 3)]


def test_where_nobody_has_looked_nothing_is_known() -> None:
    found = lane(*steps(*["training"] * 5), sampled(20, ATTIC), end_s=21)
    assert told(found) == [("compute", 0, 9), ("unknown", 9, 20), ("idle", 20, 21)]


def test_a_killed_device_is_down_from_the_very_moment_to_its_restart() -> None:
    found = lane(*steps("training", "training", "training", ""), acted(0.4, "attic", "kill"), acted(2.7, "attic", "restart"), end_s=4)
    assert told(found) == [("compute", 0, 0.4), ("down", 0.4, 2.7), ("unknown", 2.7, 3), ("idle", 3, 4)]


def test_a_device_without_a_process_is_down_and_a_frozen_one_paused() -> None:
    looks = [sampled(second, ATTIC, lives={"attic": life}) for second, life in enumerate(["missing", "ended", "paused", "running"])]
    assert told(lane(*looks, end_s=4)) == [("down", 0, 2), ("paused", 2, 3), ("idle", 3, 4)]


def test_while_the_coordinator_is_down_nobody_tells_what_devices_are_at() -> None:
    looks = [
        sampled(0, ATTIC, stages={"attic": "training"}),
        sampled(1, ATTIC, stages={"attic": "training"}, lives={"coordinator": "ended"}),
    ]
    assert told(lane(*looks, end_s=2)) == [("compute", 0, 1), ("unknown", 1, 2)]


def test_the_words_of_a_coordinator_that_was_killed_are_not_news_until_they_change() -> None:
    at_work = {"attic": "training"}
    looks = [sampled(0, ATTIC, stages=at_work), sampled(1, ATTIC, stages=at_work), sampled(2, ATTIC, stages=at_work), sampled(3, ATTIC)]
    acts = [acted(0.5, "coordinator", "kill"), acted(0.9, "coordinator", "restart")]
    assert told(lane(*looks, *acts, end_s=4)) == [("compute", 0, 1), ("unknown", 1, 3), ("idle", 3, 4)]
    coordinator = lane(*looks, *acts, member="coordinator", end_s=4)
    assert told(coordinator) == [("collect", 0, 0.5), ("down", 0.5, 0.9), ("unknown", 0.9, 3), ("collect", 3, 4)]


def test_a_coordinator_that_says_the_same_for_long_after_its_restart_means_it() -> None:
    looks = [sampled(0, ATTIC), sampled(1, ATTIC, lives={"coordinator": "ended"}), *[sampled(second, ATTIC) for second in range(2, 40)]]
    found = lane(*looks, member="coordinator", end_s=40)
    assert told(found) == [("collect", 0, 1), ("down", 1, 2), ("unknown", 2, 22), ("collect", 22, 40)]


def test_the_coordinators_lane_is_that_of_the_rounds_phases() -> None:
    looks = [
        sampled(second, ATTIC, phase=phase) for second, phase in enumerate(["preparing", "training", "folding", "evaluating", "waiting"])
    ]
    found = lane(*looks, member="coordinator", end_s=5)
    assert [activity for activity, _, _ in told(found)] == ["prepare", "collect", "fold", "evaluate", "idle"]


def test_each_fault_is_undone_by_the_first_act_that_undoes_its_kind() -> None:
    acts = [acted(1, "attic", "cut"), acted(2, "attic", "throttle"), acted(3, "attic", "mend"), acted(5, "attic", "unthrottle")]
    found = lane(*steps(*[""] * 6), *acts)
    assert [(fault.kind, fault.begin_s, fault.end_s) for fault in found.faults] == [("cut", 1, 3), ("throttle", 2, 5)]


def test_a_fault_that_nobody_undid_stays_open_and_an_out_of_memory_is_over_at_once() -> None:
    found = lane(*steps(*[""] * 6), acted(1, "attic", "fill_disk"), acted(2, "attic", "out_of_memory"))
    assert [(fault.kind, fault.end_s) for fault in found.faults] == [("fill_disk", None), ("out_of_memory", 2)]


def test_a_device_is_back_when_it_is_seen_at_a_task_after_the_undoing() -> None:
    found = lane(*steps("training", "", "", "", "loading", "training"), acted(1, "attic", "kill"), acted(3, "attic", "restart"))
    assert lanes.back_s(found.faults[0], found) == 3


def test_a_device_that_kept_working_is_back_with_the_undoing() -> None:
    found = lane(*steps(*["training"] * 6), acted(1, "attic", "throttle"), acted(3.5, "attic", "unthrottle"))
    assert lanes.back_s(found.faults[0], found) == 2.5


@pytest.mark.parametrize("fault", ["kill", "out_of_memory"])
def test_after_a_kill_the_coordinators_last_word_is_not_taken_for_work(fault: str) -> None:
    acts = [acted(1.5, "attic", fault), acted(1.9, "attic", "restart")]
    found = lane(*steps("training", "training", "training", "", "loading", "training"), *acts)
    assert lanes.back_s(found.faults[0], found) == 2.5


def test_a_device_that_got_no_task_again_is_not_back() -> None:
    found = lane(*steps("training", "", "", ""), acted(1, "attic", "kill"), acted(2, "attic", "restart"), end_s=4)
    assert lanes.back_s(found.faults[0], found) is None


def test_what_the_kernel_kills_unasked_is_told_and_what_was_asked_for_is_a_fault() -> None:
    looks = [sampled(second, {"attic": runs.sample(kills=kills)}) for second, kills in enumerate([3, 4, 4, 4, 4, 4, 6])]
    found = lane(*looks, acted(3.5, "attic", "out_of_memory"))  # told once it has happened
    assert [(killing.at_s, killing.processes) for killing in found.killings] == [(6, 2)]


@pytest.mark.parametrize(
    ("stages", "again"),
    [
        (["loading", "training", "uploading", "fetching state", "evaluating"], 0),
        (["training", "", "training"], 0),
        (["training", "loading", "training", "uploading"], 1),
        (["training", "queued", "training", "fetching state", "training"], 2),
    ],
)
def test_training_counts_as_lost_where_a_device_fetches_or_loads_and_trains_again(stages: list[str], again: int) -> None:
    content = runs.text([runs.began([runs.device("attic")]), *steps(*stages)])
    assert lanes.trained_again(records.parse(content, "run.jsonl"), "attic") == again


def test_training_in_the_next_round_is_not_again() -> None:
    looks = [
        sampled(second, ATTIC, stages={"attic": stage}, round_number=1 + second // 2)
        for second, stage in enumerate(["loading", "training"] * 3)
    ]
    content = runs.text([runs.began([runs.device("attic")]), *looks])
    assert lanes.trained_again(records.parse(content, "run.jsonl"), "attic") == 0
