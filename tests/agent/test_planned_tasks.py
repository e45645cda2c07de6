"""A whole agent in planned rounds: it is measured, trains its blocks, keeps to its rate and tells its link."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.torch import load

from fleetune.methods.v1 import deft_pb2
from fleetune.model import adapter
from fleetune.v1 import messages_pb2
from fleetune.wire import basefiles
from support.adapted import adapted
from support.agent_process import agent
from support.fake_coordinator import FakeCoordinator
from support.jobs import recipe_message
from support.tiny_models import coloured_rows, tiny_classifier, write_jsonl

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DEPTHS = 3
RATE_BITS_PER_S = 2e6
WAIT_S = 200.0


@pytest_asyncio.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator()
    await fake.start()
    yield fake
    await fake.stop()


def a_task(coordinator: FakeCoordinator, base: Path, state: bytes, kind: str, depths: list[int]) -> messages_pb2.Task:
    files = basefiles.scan(base)
    message = messages_pb2.Task(
        task_id=f"job/1/one/{kind}",
        job_id="job",
        round=1,
        lease=1,
        kind=messages_pb2.TASK_KIND_MEASURE if kind == "measure" else messages_pb2.TASK_KIND_TRAIN,
        method="deft",
        state=coordinator.add_blob(state),
        recipe=recipe_message(),
        keep_warm_s=60.0,
        seed=3,
        uplink=messages_pb2.UplinkRate(bits_per_s=RATE_BITS_PER_S),
    )
    message.base.digest = files.digest
    for file in files.files:
        message.base.files.add(name=file.name, blob=coordinator.add_blob((base / file.name).read_bytes()))
    payload = deft_pb2.DeftTask(
        depths=depths, depth_count=DEPTHS, payload=deft_pb2.DEFT_PAYLOAD_GRADIENT, batch_size=4, gradient_accumulation=1, steps=1
    )
    message.payload.Pack(payload)
    return message


async def test_a_device_is_measured_trains_a_block_and_tells_what_that_has_shown(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    base = tiny_classifier(tmp_path / "base")
    rows = write_jsonl(tmp_path / "rows.jsonl", coloured_rows())
    state = adapter.write_state(tmp_path / "state.safetensors", adapted(base, recipe_message())).path.read_bytes()
    async with agent(tmp_path / "one", coordinator.address, "--data", f"colours={rows}", "--set", "training.cores=1") as running:
        await coordinator.until(lambda: bool(coordinator.probed_bytes))
        await coordinator.until(lambda: any(beat.HasField("link") for beat in coordinator.heartbeats))
        coordinator.send(task=a_task(coordinator, base, state, "measure", [1, 2, 3]))
        await coordinator.until(lambda: bool(coordinator.outcomes), WAIT_S)
        coordinator.send(task=a_task(coordinator, base, state, "train", [2]))
        await coordinator.until(lambda: coordinator.finished() == ["job/1/one/train"], WAIT_S)
        # Known already: nothing is measured a second time, and no child is needed for the answer.
        again = a_task(coordinator, base, state, "measure", [1, 2, 3])
        again.task_id, asked = "job/2/one/measure", len(coordinator.outcomes)
        coordinator.send(task=again)
        await coordinator.until(lambda: len(coordinator.outcomes) > asked and coordinator.outcomes[-1].task_id == again.task_id, WAIT_S)
        log = running.log

    link = next(beat.link for beat in coordinator.heartbeats if beat.link.up_bits_per_s)
    assert (link.source, link.up_bits_per_s) == ("measured", 8 * 4 * 65536 / 0.5)
    assert not coordinator.hellos[0].link.up_bits_per_s
    figures = next(outcome.figures for outcome in coordinator.outcomes if outcome.task_id.endswith("1/one/measure"))
    assert (len(figures.step_s), len(figures.step_bytes), figures.batch_rows, figures.only_deepest) == (DEPTHS, DEPTHS, 4, False)
    assert figures.loaded_bytes < figures.room_bytes
    assert figures.ratio == 1.0
    update = coordinator.updates["job/1/one/train"]
    assert all("layer.1." in name for name in load(bytes(update.data)))
    assert update.header.report.figures.ratio != 1.0
    assert update.header.report.samples == 4
    corrected = coordinator.outcomes[-1].figures
    assert corrected.ratio == pytest.approx(update.header.report.figures.ratio)
    assert log.count("multiplying") == 0
    assert coordinator.progress
