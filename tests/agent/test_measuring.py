"""What training costs a device: asked for by a task, kept on disk, corrected by rounds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.agent import config, convert
from fleetune.agent.domain import Measured, Task
from fleetune.agent.measuring import Measures
from fleetune.agent.probe import keys
from fleetune.agent.probe.figures import Figures
from fleetune.agent.probe.freshness import AGE_S_MAX, RoundTimes
from fleetune.errors import UnsupportedError
from fleetune.methods.v1 import deft_pb2, echo_pb2
from fleetune.v1 import messages_pb2
from fleetune.wire import basefiles
from support.jobs import recipe_message, task_message

MODEL: dict[str, object] = {
    "batch_rows": 8,
    "step_s": [1.0, 2.0, 3.0],
    "step_bytes": [100, 200, 300],
    "loaded_bytes": 50,
    "forward_s": 0.5,
    "tokens_per_s": 7.0,
    "flops_per_s": 5.0,
    "gpu_room_bytes": 0,
    "only_deepest": False,
}
ANSWER: dict[str, object] = {"machine": {"peak_flops_per_s": 10.0}, "model": MODEL}


@pytest.fixture
def measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measures:
    monkeypatch.setattr(keys, "torch_version", lambda: "2.9.1")  # these tests need none
    return Measures(config.load(None, {}, {"state_dir": str(tmp_path), "training.memory_mib": "1"}, home=tmp_path), 1)


def a_task(kind: messages_pb2.TaskKind.ValueType = messages_pb2.TASK_KIND_MEASURE, **payload: object) -> Task:
    message = task_message("deft", deft_pb2.DeftTask(**{"batch_size": 8, "depth_count": 3, **payload}), recipe_message())  # type: ignore[arg-type]  # fields of the message
    message.kind = kind
    digest = "1" * 64
    message.base.files.add(name="config.json", blob=messages_pb2.BlobRef(digest=digest, size_bytes=2))
    message.base.digest = basefiles.base_digest([basefiles.BaseFile("config.json", digest, 2)])
    return convert.task(message, epoch=1)


def a_report(step_s: float = 4.0, peak_bytes: int = 0, samples: int = 8, steps: int = 1) -> bytes:
    report = messages_pb2.UpdateReport(samples=samples)
    report.payload.Pack(deft_pb2.DeftReport(steps=steps, batch_size=8, step_s=step_s, step_peak_bytes=peak_bytes))
    return report.SerializeToString()


async def kept(measures: Measures, task: Task) -> Figures:
    return await measures.keep(measures.wish(task), ANSWER)


async def test_figures_that_are_fresh_are_not_measured_again(measures: Measures) -> None:
    task = a_task(depths=[1, 2, 3])
    assert await measures.fresh(measures.wish(task)) is None
    measured = await kept(measures, task)
    assert await measures.fresh(measures.wish(task)) == measured


async def test_old_figures_are_measured_again(measures: Measures, monkeypatch: pytest.MonkeyPatch) -> None:
    task = a_task(depths=[1])
    await kept(measures, task)
    later = time.time() + AGE_S_MAX + 60
    monkeypatch.setattr(time, "time", lambda: later)
    assert await measures.fresh(measures.wish(task)) is None


async def test_rows_shorter_than_the_measured_ones_do_not_make_figures_stale(measures: Measures) -> None:
    task = a_task(kind=messages_pb2.TASK_KIND_TRAIN, depths=[1])
    await kept(measures, task)
    for _ in range(9):
        await measures.observed(task, a_report(step_s=0.2), 0)
    held = await measures.fresh(measures.wish(task))
    assert held is not None
    assert held.rounds.average == pytest.approx(0.2)


def test_a_task_without_depths_asks_for_each_block_alone(measures: Measures) -> None:
    alone, down = measures.wish(a_task()), measures.wish(a_task(depths=[1, 2]))
    assert (alone.only, down.only) == (True, False)
    assert alone.key != down.key


def test_another_batch_payload_or_length_has_other_figures(measures: Measures) -> None:
    usual = measures.wish(a_task(depths=[1])).key
    delta = deft_pb2.DEFT_PAYLOAD_DELTA
    assert len({usual, measures.wish(a_task(depths=[1], batch_size=4)).key, measures.wish(a_task(depths=[1], payload=delta)).key}) == 3


def test_names_of_labels_and_columns_do_not_matter() -> None:
    one = recipe_message(labels=("a", "b"), columns={"text": "t", "label": "l"})
    other = recipe_message(labels=("yes", "no"), columns={"text": "question", "label": "kind"})
    assert keys.recipe_digest(one) == keys.recipe_digest(other)
    assert keys.recipe_digest(one) != keys.recipe_digest(recipe_message(labels=("a", "b", "c")))
    assert keys.recipe_digest(one) != keys.recipe_digest(recipe_message(labels=("a", "b"), max_length=64))


def test_a_method_that_does_not_plan_cannot_be_measured(measures: Measures) -> None:
    message = task_message("echo", echo_pb2.EchoTask())
    message.kind = messages_pb2.TASK_KIND_MEASURE
    with pytest.raises(UnsupportedError, match="echo"):
        measures.wish(convert.task(message, epoch=1))


async def test_what_the_coordinator_gets(measures: Measures) -> None:
    held = replace(await kept(measures, a_task(depths=[1])), rounds=RoundTimes().observed(1.0, 2.0))
    told = measures.message(held, held_bytes=0)
    assert list(told.step_s) == [2.0, 4.0, 6.0]
    assert list(told.step_bytes) == [100, 200, 300]
    assert (told.batch_rows, told.loaded_bytes, told.forward_s, told.ratio, told.source) == (8, 50, 1.0, 2.0, "measured")
    # The owner's bound, a MiB, is less than what is free.
    assert told.room_bytes == 1 << 20
    task = a_task(depths=[1])
    outcome = convert.outcome(Measured(task.task_id, 1, 1, told.SerializeToString()))
    assert outcome.figures == told


async def test_a_round_corrects_the_figures_and_reports_them(measures: Measures) -> None:
    task = a_task(kind=messages_pb2.TASK_KIND_TRAIN, depths=[2])
    await kept(measures, a_task(depths=[1, 2, 3]))
    told = messages_pb2.UpdateReport.FromString(await measures.observed(task, a_report(step_s=4.0), 0))
    assert told.samples == 8
    assert told.figures.ratio == 2.0
    assert list(told.figures.step_s) == [2.0, 4.0, 6.0]
    again = messages_pb2.UpdateReport.FromString(await measures.observed(task, a_report(step_s=2.0), 0))
    assert again.figures.ratio == pytest.approx(1.7)
    assert again.figures.margin > 1.0


async def test_a_step_over_other_rows_is_judged_by_its_rows(measures: Measures) -> None:
    task = a_task(kind=messages_pb2.TASK_KIND_TRAIN, depths=[2])
    await kept(measures, a_task(depths=[1]))
    told = messages_pb2.UpdateReport.FromString(await measures.observed(task, a_report(step_s=4.0, samples=16), 0))
    assert told.figures.ratio == 1.0


async def test_a_peak_above_the_reckoned_one_raises_it_and_what_is_deeper(measures: Measures) -> None:
    task = a_task(kind=messages_pb2.TASK_KIND_TRAIN, depths=[2])
    await kept(measures, a_task(depths=[1]))
    await measures.observed(task, a_report(peak_bytes=250), 0)
    told = messages_pb2.UpdateReport.FromString(await measures.observed(task, a_report(), 0))
    assert list(told.figures.step_bytes) == [100, 250, 300]


async def test_blocks_that_were_measured_alone_are_corrected_too(measures: Measures) -> None:
    await kept(measures, a_task())
    told = messages_pb2.UpdateReport.FromString(
        await measures.observed(a_task(kind=messages_pb2.TASK_KIND_TRAIN, depths=[3]), a_report(step_s=6.0), 0)
    )
    assert told.figures.ratio == 2.0


async def test_without_figures_a_report_stays_as_it_was(measures: Measures) -> None:
    assert await measures.observed(a_task(kind=messages_pb2.TASK_KIND_TRAIN, depths=[2]), a_report(), 0) == a_report()
