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
