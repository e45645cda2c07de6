"""Connections that are replaced under running calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from fleetune.agent.links import Line, Links
from fleetune.wire import channel


@pytest_asyncio.fixture
async def dialled() -> AsyncIterator[list[grpc.aio.Channel]]:
    yield []


@pytest_asyncio.fixture
async def line(dialled: list[grpc.aio.Channel]) -> AsyncIterator[Line]:
    def dial() -> grpc.aio.Channel:
        dialled.append(channel.open_channel("127.0.0.1:1"))
        return dialled[-1]

    made = Line(dial)
    yield made
    await made.close()


def is_open(opened: grpc.aio.Channel) -> bool:
    return opened.get_state() is not grpc.ChannelConnectivity.SHUTDOWN


async def test_calls_share_one_channel(line: Line, dialled: list[grpc.aio.Channel]) -> None:
    async with line.use() as first, line.use() as second:
        assert first is second
    async with line.use() as third:
        assert third is dialled[0] and len(dialled) == 1


async def test_a_replaced_channel_lives_until_its_last_call_has_ended(line: Line, dialled: list[grpc.aio.Channel]) -> None:
    async with line.use() as old:
        async with line.use():
            line.replace()
        assert is_open(old)
        async with line.use() as new:
            assert new is not old
    for _ in range(3):
        await asyncio.sleep(0)
    assert not is_open(old) and is_open(new)


async def test_a_paused_line_dials_nobody_until_it_is_resumed() -> None:
    dialled: list[grpc.aio.Channel] = []

    def dial() -> grpc.aio.Channel:
        dialled.append(channel.open_channel("127.0.0.1:1"))
        return dialled[-1]

    links = Links(dial)
    links.pause()

    async def call() -> None:
        async with links.bulk.use():
            pass

    waiting = asyncio.create_task(call())
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.05)
    assert dialled == []
    links.resume()
    await waiting
    assert len(dialled) == 1
    await links.close()
