"""An update far larger than those of the rounds before is refused over the wire, and its device named once it goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fleetune.coordinator.rounds.aggregate import KIND_KEY
from fleetune.v1 import control_pb2, messages_pb2
from fleetune.wire import codec
from support.coordinating import coordinating, echo_job
from support.echo_agent import EchoAgent


def delta_of(data: bytes, value: float) -> bytes:
    """A delta of that value for every element of the tensors that `data` holds."""
    table = codec.parse_header(data, len(data))
    header = codec.build_header(table.specs, {KIND_KEY: "delta"})
    return header + np.full(sum(spec.elements for spec in table.specs), value, np.float32).tobytes()


async def test_the_third_update_beyond_the_bound_quarantines_its_device(tmp_path: Path) -> None:
    async with (
        coordinating(tmp_path) as coordinator,
        EchoAgent(coordinator.address, "good") as good,
        EchoAgent(coordinator.address, "odd") as odd,
    ):
        job = await coordinator.submit(echo_job(rounds=5))
        statuses: list[int] = []
        for number in range(1, 5):
            for agent in (odd, good):
                task = await agent.next_task()
                value = 1e6 if agent is odd and number > 1 else 0.5
                receipt = await agent.upload(task, delta_of(await agent.trained(task), value))
                if agent is odd:
                    statuses.append(receipt.status)
                    assert ("norm" in receipt.reason) == (number > 1)
        assert statuses == [messages_pb2.RECEIPT_STATUS_ACCEPTED] + 3 * [messages_pb2.RECEIPT_STATUS_REFUSED]
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=job.job_id))).job
        assert "quarantined: odd after 3 updates beyond the norm bound" in view.message
        task = await good.next_task()
        await good.upload(task, delta_of(await good.trained(task), 0.5))
        await coordinator.ended(job)
        assert job.machine.status == "completed"
        assert odd.tasks.empty()
