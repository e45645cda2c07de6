"""Figures of small runs whose answers are known by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fleetune.coordinator.testbed import records, runfigures
from fleetune.coordinator.testbed.runfigures import RunFigures
from support import testbed_runs as runs
from support.testbed_runs import Line, acted, committed, job_report, sampled, task

MIB = runs.MIB
DEVICES = [runs.device("attic"), runs.device("barn", "pi5", cpus=1.0)]
BOTH = [task("attic", samples=300), task("barn", samples=100)]


def figures(*lines: Line, report: Line | None = None, end_s: float = 40, devices: Sequence[Line] = DEVICES) -> RunFigures:
    last = [runs.ended(end_s, report, devices=["attic", "barn"])] if report is not None else []
    return runfigures.run_figures(records.parse(runs.text([runs.began(devices), *lines, *last]), "run.jsonl"))


def looks(*, energy: bool = False) -> list[Line]:
    """Each second, attic sends 1 MiB and computes for half of it, barn sends half a MiB and computes all the time."""
    return [
        sampled(
            second,
            {
                "attic": runs.sample(10 + second * 0.5, 5000 + second * MIB, energy_j=second * 2.0 if energy else None),
                "barn": runs.sample(second * 1.0, second * MIB // 2, energy_j=second * 3.0),
            },
        )
        for second in range(41)
    ]


HISTORY = [
    committed(1, 0, 10, {"accuracy": 0.5, "loss": 2.0}, BOTH, upload_bytes=2 * MIB),
    committed(2, 10, 20, {"accuracy": 0.8, "loss": 1.0}, BOTH, upload_bytes=2 * MIB),
    committed(3, 20, 40, {"accuracy": 0.7, "loss": 0.5}, BOTH, upload_bytes=2 * MIB, late=1),
]
REPORT = job_report(HISTORY, initial={"accuracy": 0.1, "loss": 2.5}, deadline_s=15)


def test_a_rounds_cost_is_all_that_devices_used_until_its_commit() -> None:
    points = figures(*looks(), report=REPORT).points
    assert [(point.round_number, point.value) for point in points] == [(0, 0.1), (1, 0.5), (2, 0.8), (3, 0.7)]
    assert points[0].costs["wall_s"] == 0
    assert points[2].costs == {"wall_s": 20, "sent_bytes": 30 * MIB, "upload_bytes": 4 * MIB, "cpu_s": 30, "energy_j": None}


def test_between_two_samples_a_cost_grows_in_proportion() -> None:
    history = [committed(1, 0, 10.25, {"accuracy": 0.5}, BOTH)]
    point = figures(*looks(), report=job_report(history)).points[0]
    assert point.costs["cpu_s"] == pytest.approx(10.25 * 1.5)


def test_energy_is_a_cost_only_where_every_device_tells_its_own() -> None:
    assert figures(*looks(), report=REPORT).spent["energy_j"] is None
    assert figures(*looks(energy=True), report=REPORT).spent["energy_j"] == 40 * 5.0


def test_a_counter_that_a_restart_sets_back_loses_nothing() -> None:
    counts = [100, 200, 50, 80]
    lines = [sampled(second, {"attic": runs.sample(0, count), "barn": runs.sample(0, 0)}) for second, count in enumerate(counts)]
    found = figures(*lines, report=REPORT)
    assert found.devices[0].sent_bytes == 100 + 50 + 30


def test_quality_under_budget_is_the_best_of_the_rounds_within_it() -> None:
    found = {(item.cost, item.budget): item for item in figures(*looks(), report=REPORT).qualities}
    assert (found["wall_s", 10.0].value, found["wall_s", 10.0].round_number) == (0.5, 1)
    assert found["wall_s", 30.0].value == 0.8
    last = found["wall_s", 40.0]
    assert (last.value, last.round_number, last.whole) == (0.8, 2, True)
    assert found["sent_bytes", 10.0 * MIB].value == 0.1
    assert found["sent_bytes", 50.0 * MIB].value == 0.8
    assert found["cpu_s", 20.0].value == 0.5


def test_a_budget_that_no_round_fits_has_no_quality() -> None:
    found = figures(*looks(), report=job_report(HISTORY[1:])).qualities
    assert next(item for item in found if (item.cost, item.budget) == ("wall_s", 10.0)).value is None


@pytest.mark.parametrize(
    ("cost", "whole", "wanted"),
    [
        ("wall_s", 200.0, [10, 30, 60, 120]),
        ("wall_s", 9.0, []),
        ("wall_s", 100_000.0, [1800, 3600, 7200, 18000, 36000, 86400][1:]),
        ("sent_bytes", 12.0 * MIB, [MIB, 2 * MIB, 5 * MIB, 10 * MIB]),
        ("cpu_s", 1000.0, [20, 50, 100, 200, 500]),
    ],
)
def test_budgets_are_round_and_the_same_for_every_run(cost: runfigures.Cost, whole: float, wanted: list[float]) -> None:
    assert runfigures.budgets(cost, whole) == wanted


def test_cost_to_target_is_that_of_the_first_round_that_reaches_it() -> None:
    found = {item.name: item for item in figures(*looks(), report=REPORT).targets}
    assert found["50%"].round_number == 1
    assert found["90% of the best"].level == pytest.approx(0.72)
    best = found["the best"]
    assert (best.level, best.round_number) == (0.8, 2)
    assert best.costs is not None
    assert (best.costs["wall_s"], best.costs["cpu_s"]) == (20, 30)


def test_a_target_above_the_best_is_not_reached() -> None:
    found = {item.name: item for item in figures(*looks(), report=REPORT).targets}
    assert (found["90%"].round_number, found["90%"].costs) == (None, None)


def test_of_a_metric_that_falls_a_part_of_the_best_is_a_part_of_the_way() -> None:
    report = job_report(
        [committed(n, 0, 10 * n, {"loss": loss}, BOTH) for n, loss in ((1, 2.0), (2, 0.5))], initial={"loss": 2.5}, metric="loss"
    )
    found = figures(*looks(), report=report)
    assert (found.metric, found.lower_is_better) == ("loss", True)
    levels = {item.name: item.level for item in found.targets}
    assert levels == pytest.approx({"90% of the best": 0.7, "95% of the best": 0.6, "99% of the best": 0.52, "the best": 0.5})
    assert next(item for item in found.qualities if item.budget == 10.0).value == 2.0


def test_a_job_judged_by_its_loss_is_told_by_its_accuracy_where_that_was_measured() -> None:
    assert figures(*looks(), report={**REPORT, "metric": "loss"}).metric == "accuracy"


def test_rounds_on_time_are_those_within_the_deadline() -> None:
    robust = figures(*looks(), report=REPORT).robustness
    assert (robust.rounds_asked, robust.rounds_committed, robust.rounds_on_time, robust.rounds_whole) == (3, 3, 2, 3)
    assert robust.due == "within 15 s"


def test_without_a_deadline_every_committed_round_counts() -> None:
    robust = figures(*looks(), report=job_report(HISTORY)).robustness
    assert (robust.rounds_on_time, robust.due) == (3, "the job has no deadline: every committed round counts")


def test_a_planned_round_is_on_time_within_its_factor_of_the_plan() -> None:
    plans: list[Line] = [{"predicted_s": 10.0, "actual_s": 14.0}, {"predicted_s": 10.0, "actual_s": 16.0}]
    history = [{**item, "plan": plan} for item, plan in zip(HISTORY[:2], plans, strict=True)]
    robust = figures(*looks(), report=job_report(history)).robustness
    assert (robust.rounds_on_time, robust.due) == (1, "trained within 1.5 times the plan")


def test_tasks_are_counted_by_what_became_of_them() -> None:
    tasks = [task("attic"), task("barn", "failed", failure=runs.out_of_memory())]
    history = [
        committed(1, 0, 10, {"accuracy": 0.5}, tasks),
        committed(2, 10, 20, {"accuracy": 0.6}, [task("attic"), task("barn", "missed")], late=1),
    ]
    robust = figures(*looks(), report=job_report(history)).robustness
    assert (robust.tasks_asked, robust.tasks_done, robust.tasks_failed, robust.tasks_lost, robust.tasks_late) == (4, 2, 1, 1, 1)
    assert robust.rounds_whole == 0


def test_evaluations_are_no_training_tasks() -> None:
    history = [committed(1, 0, 10, {"accuracy": 0.5}, [task("attic"), task("attic", kind="evaluate"), task("barn", kind="measure")])]
    found = figures(*looks(), report=job_report(history))
    assert (found.robustness.tasks_asked, found.rounds[0].asked) == (1, 1)


def test_faults_and_the_way_back_from_each() -> None:
    both = {name: runs.sample() for name in ("attic", "barn")}
    stages = [sampled(second, both, stages={"attic": "loading" if second == 5 else "training"}) for second in range(10)]
    acts = [acted(2, "attic", "kill"), acted(5, "attic", "restart"), acted(3, "barn", "pause"), acted(4, "barn", "resume")]
    acts += [acted(6, "barn", "fill_disk"), acted(7, "coordinator", "throttle"), acted(9, "coordinator", "unthrottle")]
    robust = figures(*stages, *acts, report=REPORT).robustness
    assert robust.faults_made == {"kill": 1, "pause": 1, "fill_disk": 1, "throttle": 1}
    assert (robust.faults_undone, robust.faults_open) == (3, 1)
    assert [(item.fault.member, item.back_s) for item in robust.recoveries] == [
        ("attic", 3),
        ("barn", None),
        ("barn", None),
        ("coordinator", 2),
    ]
    assert [item.was_at for item in robust.recoveries] == ["compute", "idle", "idle", "collect"]
    assert (robust.back_count, robust.back_median_s, robust.back_max_s) == (2, 2.5, 3)


def test_a_fault_that_the_machine_refused_was_not_made() -> None:
    refused = [
        acted(2, "attic", "pause", "could not be done: unable to freeze."),
        acted(4, "attic", "resume", "could not be done: not paused."),
    ]
    found = figures(*looks(), *refused, report=REPORT)
    assert (found.robustness.faults_made, found.robustness.faults_not_made, found.robustness.faults_open) == ({}, 1, 0)
    assert found.devices[0].seconds["paused"] == 0


def test_a_fault_that_could_not_be_undone_stays_open() -> None:
    acts = [acted(2, "attic", "cut", "link cut"), acted(4, "attic", "mend", "could not be done: no such link.")]
    robust = figures(*looks(), *acts, report=REPORT).robustness
    assert (robust.faults_made, robust.faults_not_made, robust.faults_open) == ({"cut": 1}, 0, 1)


def test_nobody_has_looked_at_the_history_until_the_record_says_so() -> None:
    assert figures(*looks(), report=REPORT).robustness.violations is None
    broken: Line = {"rule": "link_differs", "job_id": "j", "round_number": 2, "message": "best leads to round 1"}
    lines = [runs.began(DEVICES), runs.ended(40, REPORT), runs.checked(44, [broken])]
    found = runfigures.run_figures(records.parse(runs.text(lines), "run.jsonl"))
    assert found.robustness.violations == ("link_differs (round 2): best leads to round 1",)


def test_a_devices_figures() -> None:
    attic = figures(*looks(), report=REPORT).devices[0]
    assert (attic.device, attic.kind, attic.cpus, attic.online) == ("attic", "pi4", 0.5, True)
    assert (attic.rounds_done, attic.samples, attic.share) == (3, 900, 0.75)
    assert (attic.cpu_s, attic.sent_bytes, attic.cpus_highest) == (20, 40 * MIB, 0.5)
    assert attic.up_mbit_highest == pytest.approx(MIB * 8 / 1e6)
    assert (attic.memory_peak_bytes, attic.out_of_memory_kills, attic.energy_j) == (100 * MIB, 0, None)
    assert attic.failure == ""


def test_a_device_that_ran_out_of_memory_says_so_by_name() -> None:
    tasks = [task("attic"), task("barn", "failed", failure=runs.out_of_memory("512 MiB were not enough."))]
    barn = figures(*looks(), report=job_report([committed(1, 0, 10, {"accuracy": 0.5}, tasks)])).devices[1]
    assert barn.failure == "out of memory (train): 512 MiB were not enough."
    assert barn.failures[0].kind == "out_of_memory"


def test_a_device_that_never_came_online_has_a_lane_and_costs_nothing() -> None:
    lines = [sampled(second, {"attic": runs.sample(second, second)}, lives={"attic": "running", "barn": "missing"}) for second in range(41)]
    record = [runs.began(DEVICES), *lines, runs.ended(40, job_report(HISTORY[:1]), devices=["attic"])]
    found = runfigures.run_figures(records.parse(runs.text(record), "run.jsonl"))
    barn = found.devices[1]
    assert (barn.online, barn.failure) == (False, "it never came online")
    assert (barn.cpu_s, barn.sent_bytes, barn.seconds["down"]) == (None, None, 40)
    assert found.spent["cpu_s"] == 40


def test_of_a_device_that_ran_unwatched_no_sum_is_made() -> None:
    lines = [sampled(second, {"attic": runs.sample(second, second), "barn": runs.sample(None, None)}) for second in range(41)]
    found = figures(*lines, report=REPORT)
    assert (found.spent["cpu_s"], found.spent["sent_bytes"], found.spent["upload_bytes"]) == (None, None, 6 * MIB)
    assert {item.cost for item in found.qualities} == {"wall_s", "upload_bytes"}


def test_a_job_that_failed_before_its_first_round() -> None:
    failed = task("barn", "failed", failure=runs.out_of_memory())
    report = job_report(
        [],
        state="failed",
        rounds_total=5,
        current={"round": 1, "tasks": [failed]},
        failure=runs.out_of_memory(),
        failed_device="barn",
        message="barn failed.",
    )
    found = figures(*looks(), report=report)
    assert (found.status, found.points, found.targets) == ("failed", (), ())
    assert (found.robustness.rounds_asked, found.robustness.rounds_committed) == (5, 0)
    assert [item.round_number for item in found.devices[1].failures] == [1]
    assert found.robustness.final_value is None


def test_a_run_that_was_cut_off_has_what_samples_tell() -> None:
    found = figures(*looks())
    assert (found.status, found.points, found.wall_s) == (runfigures.UNFINISHED, (), 40)
    assert found.spent["cpu_s"] == 60
    assert found.devices[0].online is None


def test_a_record_of_its_first_line_alone_has_figures() -> None:
    found = figures()
    assert (found.wall_s, found.points, len(found.devices)) == (0, (), 2)
    assert found.spent["cpu_s"] is None or found.spent["cpu_s"] == 0
