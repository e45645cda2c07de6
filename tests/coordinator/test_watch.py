"""What a watcher sees: pictures at several widths, lines for pipes."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator

import pytest
from rich.console import Console

from fleetune.coordinator import watch
from fleetune.v1 import control_pb2 as pb
from fleetune.v1 import fleet_pb2, messages_pb2
from support import job_views
from support.job_views import MIB, START_UNIX_S, committed, job, task

ASSIGNED = pb.DEVICE_TASK_STATE_ASSIGNED
OUT_OF_MEMORY = messages_pb2.Failure(
    kind=messages_pb2.FAILURE_KIND_OUT_OF_MEMORY, stage="train", message="The training process was ended for lack of memory."
)


def drawn(view: pb.JobView, width: int = 80, height: int = 40, notice: str = "") -> list[str]:
    """The picture as lines of text."""
    console = Console(width=width, height=height, file=io.StringIO(), record=True, color_system=None)
    console.print(watch.render(view, now_unix_s=START_UNIX_S + 61, width=width, height=height, notice=notice))
    return console.export_text().splitlines()


def line_with(lines: list[str], word: str) -> str:
    return next(line for line in lines if word in line)


def training(*tasks: pb.DeviceTask, rounds: int = 10) -> pb.JobView:
    return job(current=pb.RoundView(round=1, phase=pb.ROUND_PHASE_TRAINING, tasks=tasks), rounds=rounds)


def test_a_running_job_at_80_columns() -> None:
    lines = drawn(job_views.in_training())
    assert "intents" in lines[0] and "7f3a21c9" in lines[0] and lines[0].rstrip().endswith("running")
    assert "1m 01s, about 1m 05s left" in lines[1]
    assert "5/10" in lines[2] and "training, 1 of 3 devices done" in lines[2]
    assert line_with(lines, "kitchen-pi").split()[1] == "training" and "5/12" in line_with(lines, "kitchen-pi")
    assert "0.5213" in line_with(lines, "kitchen-pi")
    assert "40% of 5.0 MiB" in line_with(lines, "garage-orin")
    assert "done" in line_with(lines, "hall-laptop") and "384" in line_with(lines, "hall-laptop")
    assert "best round 4: accuracy 70.0%" in lines[-1] and "up 36 MiB" in lines[-1]


def pruned(view: pb.JobView) -> pb.JobView:
    """The same with devices that prune: two on their way, one that is through and has cut less than it was told."""
    for number, one in enumerate(view.current.tasks):
        one.pruning.sparsity_before, one.pruning.sparsity_told, one.pruning.rank = 0.2, 0.25, 2**number
        if one.state == pb.DEVICE_TASK_STATE_DONE:
            one.pruning.sparsity_after = 0.2
    return view


@pytest.mark.parametrize("width", [80, 120])
def test_devices_that_prune_show_how_much_and_their_rank(width: int) -> None:
    lines = drawn(pruned(job_views.in_training()), width=width)
    assert line_with(lines, "kitch").split()[-3:] == [">", "25%", "1"]
    assert line_with(lines, "hall-").split()[-2:] == ["20%", "4"]


def test_a_committed_round_says_how_much_is_cut() -> None:
    view = job_views.in_training()
    told = watch.Announcer().lines(view)
    assert not any("cut" in line for line in told)
    for sparsity, one in zip((0.25, 0.5), view.history[-1].tasks, strict=False):
        one.pruning.sparsity_after = sparsity
    assert "cut 25% to 50%" in watch.Announcer().lines(view)[-2]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize(
    "view",
    [
        job_views.in_training(),
        training(
            task(
                "a-device-with-quite-a-long-name-in-the-cellar", ASSIGNED, stage=fleet_pb2.TASK_STAGE_FETCHING_BASE, done=1, total=999 * MIB
            )
        ),
        job(pb.JOB_STATE_COMPLETED, history=[committed(number, accuracy=0.9) for number in range(1, 30)], best_round=7, ended_after_s=99),
    ],
)
def test_no_line_is_wider_than_the_terminal(view: pb.JobView, width: int) -> None:
    assert max(map(len, drawn(view, width))) <= width


@pytest.mark.parametrize("height", [16, 24, 50])
def test_a_large_fleet_fits_on_the_screen_and_the_rest_is_counted(height: int) -> None:
    tasks = [task(f"pi-{number:03}", ASSIGNED, stage=fleet_pb2.TASK_STAGE_TRAINING, done=1, total=9) for number in range(200)]
    view = training(*tasks)
    view.history.extend(committed(number, accuracy=0.5) for number in range(1, 9))
    lines = drawn(view, height=height)
    assert len(lines) <= height
    assert any("more: " in line and "training" in line for line in lines)


def test_trouble_comes_before_what_is_done_when_there_is_no_room() -> None:
    tasks = [task(f"pi-{number:03}", samples=9) for number in range(60)]
    tasks.append(task("sick-pi", pb.DEVICE_TASK_STATE_FAILED, failure=OUT_OF_MEMORY))
    assert "failed" in line_with(drawn(training(*tasks), height=24), "sick-pi")


def test_a_failure_says_the_device_the_stage_and_the_message() -> None:
    text = "\n".join(drawn(training(task("hall-laptop", pb.DEVICE_TASK_STATE_FAILED, failure=OUT_OF_MEMORY))))
    assert "hall-laptop failed (train): The training process was ended for lack of" in text


def test_refused_missed_late_and_offline_devices_are_called_so() -> None:
    lines = drawn(
        training(
            task("attic", pb.DEVICE_TASK_STATE_REFUSED, failure=messages_pb2.Failure(message="on battery")),
            task("barn", pb.DEVICE_TASK_STATE_MISSED),
            task("cellar", pb.DEVICE_TASK_STATE_LATE),
            task("den", ASSIGNED, online=False),
        )
    )
    text = "\n".join(lines)
    assert "attic refused: on battery" in text
    assert "barn missed the round: not back by the deadline" in text
    assert "cellar came late" in text
    assert "offline" in line_with(lines, "den")


@pytest.mark.parametrize(
    ("stage", "word"),
    [
        (fleet_pb2.TASK_STAGE_QUEUED, "queued"),
        (fleet_pb2.TASK_STAGE_FETCHING_BASE, "fetching base"),
        (fleet_pb2.TASK_STAGE_FETCHING_STATE, "fetching state"),
        (fleet_pb2.TASK_STAGE_LOADING, "loading"),
        (fleet_pb2.TASK_STAGE_TRAINING, "training"),
        (fleet_pb2.TASK_STAGE_EVALUATING, "evaluating"),
        (fleet_pb2.TASK_STAGE_UPLOADING, "uploading"),
        (fleet_pb2.TASK_STAGE_MEASURING, "measuring"),
    ],
)
def test_every_stage_has_its_word(stage: fleet_pb2.TaskStage.ValueType, word: str) -> None:
    assert word in line_with(drawn(training(task("attic", ASSIGNED, stage=stage))), "attic")


def test_an_evaluating_device_has_one_line_with_the_loss_of_its_training() -> None:
    evaluation = task("attic", ASSIGNED, stage=fleet_pb2.TASK_STAGE_EVALUATING, done=1, total=4, kind=messages_pb2.TASK_KIND_EVALUATE)
    lines = [line for line in drawn(training(task("attic", loss=0.25, samples=384), evaluation)) if "attic" in line]
    assert len(lines) == 1
    assert "evaluating" in lines[0] and "0.2500" in lines[0] and "384" in lines[0]


def test_devices_stand_in_the_order_people_count() -> None:
    names = [f"agent-{number}" for number in (10, 2, 1)]
    lines = drawn(training(*(task(name) for name in names)))
    assert [line.split()[0] for line in lines if "agent-" in line] == ["agent-1", "agent-2", "agent-10"]


def test_a_waiting_job_says_for_what() -> None:
    assert any("waits for 3 devices" in line for line in drawn(job(pb.JOB_STATE_WAITING)))
    lines = drawn(job(pb.JOB_STATE_WAITING, message="2 of 3 devices ready (attic: on battery)"))
    assert any("attic: on battery" in line for line in lines)
    assert "waiting" in lines[0]


def test_a_paused_job_gives_no_time_left() -> None:
    lines = drawn(job(pb.JOB_STATE_PAUSED, history=[committed(1)], remaining_s=60))
    assert "paused" in lines[0]
    assert "left" not in lines[1]


def test_a_failed_job_shows_its_message_and_its_time() -> None:
    lines = drawn(job(pb.JOB_STATE_FAILED, message="two devices ran out of memory", ended_after_s=34))
    assert "failed" in lines[0] and "took 34 s" in lines[1]
    assert any("two devices ran out of memory" in line for line in lines)


def test_the_notice_of_a_lost_coordinator_is_shown() -> None:
    assert any("lost the coordinator" in line for line in drawn(job(), notice="lost the coordinator"))


def test_the_best_round_is_marked_and_old_rounds_make_room() -> None:
    history = [committed(number, accuracy=0.9 if number == 17 else 0.5) for number in range(1, 21)]
    lines = drawn(job(pb.JOB_STATE_COMPLETED, history=history, rounds=20, best_round=17, ended_after_s=240, initial_accuracy=0.08))
    assert "best" in line_with(lines, " 17 ") and "90.0%" in line_with(lines, " 17 ")
    assert any(line.split()[:1] == ["..."] for line in lines)
    assert any(line.split()[:1] == ["start"] and "8.0%" in line for line in lines)


def test_the_loss_on_the_evaluation_rows_stands_where_there_is_room() -> None:
    view = job(history=[committed(1, accuracy=0.5)])
    assert "eval loss" in "\n".join(drawn(view, 120))
    assert "eval loss" not in "\n".join(drawn(view, 80))


def test_a_job_that_is_measured_by_its_loss_shows_it_on_any_width() -> None:
    view = job(history=[committed(1)])
    view.metric = "loss"
    assert "eval loss" in "\n".join(drawn(view, 80))


def lines_of(*views: pb.JobView) -> list[str]:
    announcer = watch.Announcer()
    return [line for view in views for line in announcer.lines(view)]


def test_a_pipe_gets_one_line_for_each_thing_that_happens() -> None:
    tasks = [task("attic", ASSIGNED), task("barn", ASSIGNED)]
    first = pb.RoundView(round=1, phase=pb.ROUND_PHASE_TRAINING, tasks=tasks)
    done = committed(
        1, [task("attic", samples=9), task("barn", pb.DEVICE_TASK_STATE_FAILED, failure=OUT_OF_MEMORY)], accuracy=0.5, loss=2.0
    )
    said = lines_of(
        job(pb.JOB_STATE_WAITING, message="1 of 2 devices ready", rounds=1),
        job(pb.JOB_STATE_WAITING, message="1 of 2 devices ready", rounds=1),
        job(current=first, rounds=1, initial_accuracy=0.08),
        job(current=first, rounds=1, initial_accuracy=0.08),
        job(pb.JOB_STATE_COMPLETED, rounds=1, history=[done], best_round=1, initial_accuracy=0.08, ended_after_s=12),
    )
    assert said == [
        "job intents (7f3a21c9): 1 round of fedavg_lora",
        "waiting: 1 of 2 devices ready",
        "before the first round: eval loss 2.5100, accuracy 8.0%",
        "round 1/1 started on 2 devices: attic, barn",
        "round 1: barn failed (train): The training process was ended for lack of memory.",
        "round 1/1 committed: 1 of 2 devices, train loss 2.0000, eval loss 1.8000, accuracy 50.0%, up 3.0 MiB, down 6.0 MiB, 12 s",
        "completed after 12 s, 1 of 1 round committed; best round 1: eval loss 1.8000, accuracy 50.0%",
    ]


def test_a_pipe_that_joins_late_gets_the_rounds_so_far_and_the_time_left() -> None:
    said = lines_of(job_views.in_training(committed_rounds=2))
    assert [line.split()[1] for line in said if "committed" in line] == ["1/10", "2/10"]
    assert "about 1m 05s left" in said[-2] or "about 1m 05s left" in said[-3]


def test_a_failed_job_ends_its_lines_with_the_reason() -> None:
    said = lines_of(job(pb.JOB_STATE_FAILED, message="The base has no module called querry.", ended_after_s=1))
    assert said[-1].startswith("failed after 1.0 s, 0 of 10 rounds committed.")
    assert said[-1].endswith("no module called querry.")


async def views_of(*views: pb.JobView) -> AsyncIterator[pb.JobView]:
    for view in views:
        yield view
        await asyncio.sleep(0)


async def test_the_live_watch_returns_the_last_view_and_leaves_its_picture() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=40, color_system=None)
    last = await watch.show(
        views_of(job_views.in_training(), job(pb.JOB_STATE_COMPLETED, ended_after_s=9)), console, watch.Notice(), lines=False
    )
    assert last.state == pb.JOB_STATE_COMPLETED
    assert isinstance(console.file, io.StringIO)
    assert "took 9.0 s" in console.file.getvalue()


async def test_the_live_watch_gives_the_cursor_back_when_it_fails() -> None:
    async def broken() -> AsyncIterator[pb.JobView]:
        yield job_views.in_training()
        raise ConnectionError("gone")

    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=40)
    with pytest.raises(ConnectionError):
        await watch.show(broken(), console, watch.Notice(), lines=False)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?25h" in console.file.getvalue()


async def test_a_watch_in_json_is_one_document_a_line() -> None:
    out = io.StringIO()
    await watch.show_json(views_of(job_views.in_training(), job(pb.JOB_STATE_CANCELLED, ended_after_s=9)), out)
    documents = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [document["state"] for document in documents] == ["running", "cancelled"]
    assert documents[0]["current"]["tasks"][0]["stage"] == "training"
    assert documents[0]["initial_metrics"]["accuracy"] == pytest.approx(0.0812)


# --- planned rounds


def test_a_planned_round_shows_who_trains_what_at_which_rate_and_when_it_is_due() -> None:
    for width in (80, 104):
        lines = drawn(job_views.in_planned_training(), width=width)
        line = line_with(lines, "kitchen-pi")
        assert "layer.2-0" in line
        assert "5.2 Mbit/s" in line
        assert "42 s" in line
        late = line_with(lines, "attic-nano")
        assert "34 s" in late
        assert "48 s" in late
        assert line_with(lines, "plan: blocks").strip() == "plan: blocks (exact), 42 s predicted, 1 device idle"
        assert all(len(line.rstrip()) <= width for line in lines)


def test_the_lines_of_a_planned_round_tell_its_plan_once_and_what_it_took() -> None:
    announcer = watch.Announcer()
    view = job_views.in_planned_training()
    said = announcer.lines(view)
    assert any("round 4/10 plan: blocks (exact), 42 s predicted, 1 device idle: attic-nano layer.5" in line for line in said)
    assert any("training 44 s of 40 s predicted" in line for line in said)
    assert announcer.lines(view) == []


def test_measuring_is_told_before_the_round_is_planned() -> None:
    view = job_views.job()
    measuring = [job_views.task(name, pb.DEVICE_TASK_STATE_ASSIGNED, kind=messages_pb2.TASK_KIND_MEASURE) for name in ("a", "b")]
    view.current.CopyFrom(pb.RoundView(round=1, phase=pb.ROUND_PHASE_MEASURING, tasks=measuring))
    announcer = watch.Announcer()
    assert "round 1/10: 2 devices told to measure how fast they train" in announcer.lines(view)
    assert announcer.lines(view) == []
    assert line_with(drawn(view), "measuring, 0 of 2 devices done")


def being_measured(name: str, done: int = 0, total: int = 0) -> pb.DeviceTask:
    stage = fleet_pb2.TASK_STAGE_MEASURING
    return job_views.task(name, pb.DEVICE_TASK_STATE_ASSIGNED, stage=stage, done=done, total=total, kind=messages_pb2.TASK_KIND_MEASURE)


@pytest.mark.parametrize("width", [80, 104])
def test_devices_that_are_measured_beside_a_round_are_shown_with_how_far_they_are(width: int) -> None:
    view = job_views.in_planned_training()
    view.newcomers.extend([being_measured("shed-pi"), being_measured("attic-pi", 2, 5)])
    lines = drawn(view, width=width)
    assert line_with(lines, "for a later plan").strip() == "for a later plan: attic-pi measuring 40%, shed-pi measuring"
    assert all(len(line.rstrip()) <= width for line in lines)


def test_of_many_newcomers_some_are_named_and_the_rest_is_counted() -> None:
    view = job_views.in_planned_training()
    view.newcomers.extend(being_measured(f"n-{number}") for number in range(9))
    assert watch.newcomers_text(view).endswith("n-3 measuring and 5 more")


def test_a_pipe_hears_once_of_a_device_that_came_later() -> None:
    view = job_views.in_planned_training()
    view.newcomers.append(being_measured("shed-pi"))
    announcer = watch.Announcer()
    assert "shed-pi came later: measured beside the rounds" in announcer.lines(view)
    assert announcer.lines(view) == []


@pytest.mark.parametrize(
    ("depths", "text"),
    [
        ([1], "head"),
        ([3], "layer.4"),
        ([1, 2, 3], "head to layer.4"),
        ([2, 3, 4], "layer.5-3"),
        ([1, 2, 3, 4, 5, 6, 7], "all 7 blocks"),
        ([2, 5], "2 blocks"),
        ([9], "depth 9"),
        ([], "-"),
    ],
)
def test_depths_have_the_names_of_their_blocks(depths: list[int], text: str) -> None:
    assert watch.blocks_text(depths, job_views.BLOCKS) == text


def test_a_share_is_of_what_is_shared() -> None:
    own = job_views.part([1], 2.0, bits_per_s=5.2e6, share=0.23)
    assert watch.share_text(own, pb.PlanView(share_unit="bit/s")) == "5.2 Mbit/s"
    assert watch.share_text(own, pb.PlanView(share_unit="airtime")) == "23% air"
    assert watch.share_text(job_views.part([1], 2.0), pb.PlanView()) == "free"
