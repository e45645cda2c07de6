"""Views of a job as a coordinator would send them, for tests of what operators see."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.v1 import control_pb2 as pb
from fleetune.v1 import fleet_pb2, messages_pb2

START_UNIX_S = 1_700_000_000.0
ROUND_S = 12.0
MIB = 1 << 20


def task(
    name: str,
    state: pb.DeviceTaskState.ValueType = pb.DEVICE_TASK_STATE_DONE,
    *,
    stage: fleet_pb2.TaskStage.ValueType = fleet_pb2.TASK_STAGE_UNSPECIFIED,
    done: int = 0,
    total: int = 0,
    loss: float | None = None,
    samples: int = 0,
    online: bool = True,
    failure: messages_pb2.Failure | None = None,
    kind: messages_pb2.TaskKind.ValueType = messages_pb2.TASK_KIND_TRAIN,
) -> pb.DeviceTask:
    """One device's part in a round."""
    view = pb.DeviceTask(
        device_name=name, kind=kind, state=state, stage=stage, done=done, total=total, samples=samples, online=online, failure=failure
    )
    if loss is not None:
        view.loss = loss
    return view


def committed(
    number: int, tasks: Sequence[pb.DeviceTask] | None = None, *, accuracy: float | None = None, loss: float = 1.0
) -> pb.RoundView:
    """A committed round; three devices did their part unless told otherwise."""
    own = (
        list(tasks) if tasks is not None else [task(name, samples=384, loss=loss) for name in ("kitchen-pi", "garage-orin", "hall-laptop")]
    )
    folded = sum(item.state == pb.DEVICE_TASK_STATE_DONE for item in own)
    metrics = [messages_pb2.Metric(name="loss", value=loss * 0.9)]
    if accuracy is not None:
        metrics.append(messages_pb2.Metric(name="accuracy", value=accuracy))
    return pb.RoundView(
        round=number,
        phase=pb.ROUND_PHASE_COMMITTED,
        tasks=own,
        started_unix_s=START_UNIX_S + (number - 1) * ROUND_S,
        ended_unix_s=START_UNIX_S + number * ROUND_S,
        train_loss=loss,
        metrics=metrics,
        evaluation_rows=345,
        upload_bytes=folded * 3 * MIB,
        download_bytes=len(own) * 3 * MIB,
        updates_folded=folded,
    )


def job(
    state: pb.JobState.ValueType = pb.JOB_STATE_RUNNING,
    *,
    rounds: int = 10,
    history: Sequence[pb.RoundView] = (),
    current: pb.RoundView | None = None,
    message: str = "",
    best_round: int = 0,
    remaining_s: float | None = None,
    ended_after_s: float = 0.0,
    initial_accuracy: float | None = None,
) -> pb.JobView:
    """A classification job called "intents"."""
    view = pb.JobView(
        job_id="7f3a21c9",
        name="intents",
        state=state,
        message=message,
        method="fedavg_lora",
        model_task="text-classification",
        base="all-MiniLM-L6-v2",
        rounds_total=rounds,
        rounds_committed=len(history),
        submitted_unix_s=START_UNIX_S - 5,
        started_unix_s=START_UNIX_S,
        ended_unix_s=START_UNIX_S + ended_after_s if ended_after_s else 0.0,
        history=history,
        current=current,
        best_round=best_round,
        metric="accuracy",
        upload_bytes=sum(item.upload_bytes for item in history),
        download_bytes=sum(item.download_bytes for item in history),
        devices_minimum=3,
    )
    if remaining_s is not None:
        view.remaining_s = remaining_s
    if initial_accuracy is not None:
        view.initial_metrics.extend(
            [messages_pb2.Metric(name="loss", value=2.51), messages_pb2.Metric(name="accuracy", value=initial_accuracy)]
        )
    return view


def in_training(*, committed_rounds: int = 4) -> pb.JobView:
    """Mid-round: one device trains, one uploads, one is done."""
    history = [committed(number, accuracy=0.5 + 0.05 * number, loss=2.0 / number) for number in range(1, committed_rounds + 1)]
    assigned = pb.DEVICE_TASK_STATE_ASSIGNED
    tasks = [
        task("kitchen-pi", assigned, stage=fleet_pb2.TASK_STAGE_TRAINING, done=5, total=12, loss=0.5213),
        task("garage-orin", assigned, stage=fleet_pb2.TASK_STAGE_UPLOADING, done=2 * MIB, total=5 * MIB, loss=0.4871),
        task("hall-laptop", samples=384, loss=0.4402),
    ]
    current = pb.RoundView(round=committed_rounds + 1, phase=pb.ROUND_PHASE_TRAINING, tasks=tasks, started_unix_s=START_UNIX_S + 48)
    return job(history=history, current=current, best_round=committed_rounds, remaining_s=65, initial_accuracy=0.0812)


BLOCKS = ("head", "layer.5", "layer.4", "layer.3", "layer.2", "layer.1", "layer.0")


def part(
    depths: Sequence[int], predicted_s: float, actual_s: float | None = None, *, bits_per_s: float = 0.0, share: float = 0.0
) -> pb.TaskPlan:
    """A device's part of a planned round, which ends as its upload ends."""
    made = pb.TaskPlan(
        depths=depths, share=share, uplink_bits_per_s=bits_per_s, predicted_ready_s=predicted_s * 0.6, predicted_finish_s=predicted_s
    )
    if actual_s is not None:
        made.actual_ready_s, made.actual_finish_s = actual_s * 0.6, actual_s
    return made


def plan(predicted_s: float, actual_s: float | None = None, **more: object) -> pb.PlanView:
    """A round's plan, in blocks unless told otherwise."""
    made = pb.PlanView(layout="blocks", solver="exact", predicted_s=predicted_s, share_unit="bit/s")
    made.MergeFrom(pb.PlanView(**more))  # type: ignore[arg-type]  # its own fields
    if actual_s is not None:
        made.actual_s = actual_s
    return made


def in_planned_training() -> pb.JobView:
    """Mid-round of a planned job: one trains the whole depth, one uploads, one was late, one has failed and one waits idle."""
    assigned = pb.DEVICE_TASK_STATE_ASSIGNED
    tasks = [
        task("kitchen-pi", assigned, stage=fleet_pb2.TASK_STAGE_TRAINING, done=1, total=1, loss=0.5213),
        task("garage-orin", assigned, stage=fleet_pb2.TASK_STAGE_UPLOADING, done=2 * MIB, total=5 * MIB, loss=0.4871),
        task("hall-laptop", samples=16, loss=0.4402),
        task("attic-nano", samples=16, loss=0.5102),
        task("porch-pi", pb.DEVICE_TASK_STATE_FAILED, failure=messages_pb2.Failure(stage="train", message="killed for memory")),
    ]
    parts = [
        part([5, 6, 7], 42.5, bits_per_s=5.2e6),
        part([3, 4], 38.1, bits_per_s=12.4e6),
        part([1], 37.0, 36.2, bits_per_s=0.8e6),
        part([2], 33.5, 47.9, bits_per_s=2.2e6),
        part([2], 33.5, bits_per_s=2.2e6),
    ]
    for own, its in zip(tasks, parts, strict=True):
        own.plan.CopyFrom(its)
    history = [planned(number) for number in (1, 2, 3)]
    current = pb.RoundView(round=4, phase=pb.ROUND_PHASE_TRAINING, tasks=tasks, started_unix_s=START_UNIX_S + 48)
    current.plan.CopyFrom(plan(42.5, idle_devices=["cellar-pi"], idle_count=1))
    view = job(history=history, current=current, best_round=3, remaining_s=65)
    view.method = "deft"
    view.blocks.extend(BLOCKS)
    return view


def planned(number: int, predicted_s: float = 40.0, actual_s: float = 44.0) -> pb.RoundView:
    """A committed planned round of two devices."""
    tasks = [task("kitchen-pi", samples=16, loss=0.5), task("hall-laptop", samples=16, loss=0.4)]
    tasks[0].plan.CopyFrom(part([2, 3, 4, 5, 6, 7], predicted_s, actual_s, bits_per_s=5e6))
    tasks[1].plan.CopyFrom(part([1], predicted_s * 0.9, predicted_s * 0.9, bits_per_s=1e6))
    made = committed(number, tasks, accuracy=0.5 + 0.1 * number)
    made.plan.CopyFrom(plan(predicted_s, actual_s))
    return made
