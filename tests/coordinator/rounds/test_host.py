"""The model host's life: warm for a while, then gone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from fleetune.child.process import OnEvent
from fleetune.coordinator.rounds import host
from fleetune.coordinator.rounds.host import ModelHost
from fleetune.v1 import messages_pb2


class Child:
    """Counts what becomes of it; a stop takes a moment."""

    def __init__(self, _: str) -> None:
        self.stops = 0
        self.stopping = asyncio.Event()
        self.stopped = asyncio.Event()

    async def request(self, op: str, fields: Mapping[str, object], on_event: OnEvent | None) -> dict[str, object]:
        assert not self.stopping.is_set(), "asked while it ends"
        return {"metrics": {"loss": 1.0}, "rows": 3}

    async def stop(self) -> None:
        self.stopping.set()
        await asyncio.sleep(0.01)
        self.stopping.clear()
        self.stops += 1
        self.stopped.set()


@pytest.fixture
async def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    made = Child("")

    def spawn(_: str, *, environment: Mapping[str, str]) -> Child:
        return made

    monkeypatch.setattr(host, "ChildProcess", spawn)
    return made


async def ask(model_host: ModelHost) -> int:
    return (await model_host.evaluate("base", messages_pb2.Recipe(), Path("state"), Path("rows"))).rows


async def test_it_ends_a_while_after_the_last_job(child: Child) -> None:
    model_host = ModelHost(keep_warm_s=0.02)
    assert await ask(model_host) == 3
    model_host.rest()
    assert child.stops == 0
    await child.stopped.wait()
    await model_host.close()


async def test_a_new_job_keeps_it(child: Child) -> None:
    model_host = ModelHost(keep_warm_s=0.05)
    model_host.rest()
    await ask(model_host)
    await asyncio.sleep(0.1)
    assert child.stops == 0
    await model_host.close()
    assert child.stops == 1


async def test_who_asks_while_it_ends_waits_for_that(child: Child) -> None:
    model_host = ModelHost(keep_warm_s=0.0)
    model_host.rest()
    await child.stopping.wait()
    assert await ask(model_host) == 3
    assert child.stops == 1
    await model_host.close()


async def test_close_waits_for_an_end_that_has_begun(child: Child) -> None:
    model_host = ModelHost(keep_warm_s=0.0)
    model_host.rest()
    await child.stopping.wait()
    await model_host.close()
    assert not child.stopping.is_set()
    assert child.stops == 2
