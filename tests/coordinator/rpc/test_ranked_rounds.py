"""Falling ranks through the real coordinator: what devices are sent, what is kept of what they send, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fleetune.coordinator.history import reader
from fleetune.v1 import messages_pb2
from support import ranked_agent
from support.coordinating import committed, coordinating
from support.ranked_agent import PREFIX, RANKS, RankedAgent, tensors_of

ACCEPTED, REFUSED = messages_pb2.RECEIPT_STATUS_ACCEPTED, messages_pb2.RECEIPT_STATUS_REFUSED
FIRST, SECOND = RANKS


@pytest.fixture(autouse=True)
def _hosted(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked_agent.hosted(monkeypatch)


async def test_every_round_has_fewer_ranks_and_publishes_a_plain_lora(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        agents = [RankedAgent(coordinator.address, name) for name in "ab"]
        for agent in agents:
            (await stack.enter_async_context(agent)).serve()
        text = ranked_agent.job(tmp_path, rounds=3, minimum=2)
        job = await coordinator.ended(await coordinator.submit(text))
        assert job.machine.status == "completed", job.machine.message
        assert agents[0].ranks == agents[1].ranks
        left = [RANKS, *agents[0].ranks[1:], job.machine.ranks]
        counts = [sum(ranks.values()) for ranks in left]
        assert counts[0] == 8 and counts[-1] == 2 and counts == sorted(counts, reverse=True)
        for number in (1, 2, 3):
            entry = committed(job, number)
            assert entry.ranks == left[number - 1]
            assert {name: mask.count("1") for name, mask in entry.alive.items() if "1" in mask} == left[number]
            assert all(task.update is not None and task.update.scores and not task.update.report for task in entry.trained())
            assert entry.fold_metrics == {"triplets": counts[number], "modules": len(left[number])}
        sizes = [committed(job, number).upload_bytes() for number in (1, 2, 3)]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
        folder = tmp_path / "jobs" / job.job_id / "final"
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == left[-1]
    assert config["alpha_pattern"] == {name: 2.0 * rank for name, rank in left[-1].items()}
    # Three rounds of ones upon ones: A, B and E are 4 each, and E is in A.
    for name, rank in left[-1].items():
        np.testing.assert_array_equal(tensors[f"{PREFIX}{name}.lora_A.weight"], np.full((rank, ranked_agent.INPUTS), 16.0))
        np.testing.assert_array_equal(tensors[f"{PREFIX}{name}.lora_B.weight"], np.full((ranked_agent.OUTPUTS, rank), 4.0))
    assert [str(violation) for violation in reader.examine(tmp_path)] == []


def good() -> dict[str, bytes]:
    return {name: struct.pack("<4e", 1, 2, 3, 4) for name in RANKS}


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({}, "no scores of"),
        ({FIRST: good()[FIRST]}, f"no scores of '{SECOND}'"),
        ({**good(), FIRST: b"\0\0"}, "2 bytes of scores"),
        ({**good(), FIRST: struct.pack("<4e", 1, math.nan, 3, 4)}, "with nan"),
        ({**good(), "evil": b"\0\0"}, "scores of 'evil'"),
    ],
    ids=["none", "of one module", "too few", "no number", "of another module"],
)
async def test_an_update_with_other_scores_is_refused_and_the_rest_goes_on(tmp_path: Path, scores: dict[str, bytes], said: str) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        bad, sound = RankedAgent(coordinator.address, "bad"), RankedAgent(coordinator.address, "sound")
        bad.scores = scores
        for agent in (bad, sound):
            await stack.enter_async_context(agent)
        job = await coordinator.submit(ranked_agent.job(tmp_path, rounds=1, minimum=2))
        receipt = await bad.answer(await bad.next_task())
        assert receipt.status == REFUSED
        assert said in receipt.reason
        assert (await sound.answer(await sound.next_task())).status == ACCEPTED
        await coordinator.ended(job)
        assert job.machine.status == "completed"
        assert [task.device_name for task in committed(job, 1).trained()] == ["sound"]
    assert [str(violation) for violation in reader.examine(tmp_path)] == []


async def test_triplets_that_are_gone_are_refused(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator, contextlib.AsyncExitStack() as stack:
        late, sound = RankedAgent(coordinator.address, "late"), RankedAgent(coordinator.address, "sound")
        for agent in (late, sound):
            await stack.enter_async_context(agent)
        job = await coordinator.submit(ranked_agent.job(tmp_path, rounds=2, minimum=2))
        for agent in (late, sound):
            assert (await agent.answer(await agent.next_task())).status == ACCEPTED
        late.tensors = tensors_of(RANKS)
        receipt = await late.answer(await late.next_task())
        assert receipt.status == REFUSED
        assert "is expected" in receipt.reason or "none of that name" in receipt.reason
        assert (await sound.answer(await sound.next_task())).status == ACCEPTED
        await coordinator.ended(job)
        assert job.machine.status == "completed"
