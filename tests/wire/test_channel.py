"""Options of channels: gRPC passes over a name that it does not know, so nothing else would tell that one was dropped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from importlib.util import find_spec
from pathlib import Path

import grpc
import grpc.aio
import pytest

from fleetune.wire import channel

SLOW_S = 0.5
"""What a connection's beginning takes on a slow link; more than the shortest pause between two tries to connect."""


def test_the_installed_grpc_knows_every_option_by_name() -> None:
    spec = find_spec("grpc._cython.cygrpc")
    assert spec is not None and spec.origin is not None
    library = Path(spec.origin).read_bytes()
    names = {name for name, _ in (*channel.server_options(), *channel.channel_options())}
    assert {name for name in names if name.encode() + b"\0" not in library} == set()


def test_what_a_connection_keeps_for_reading_is_bounded_on_both_sides() -> None:
    name = "grpc.experimental.tcp_max_read_buffer_size"
    assert dict(channel.server_options())[name] == channel.SERVER_READ_BYTES < 12 * 1024
    assert dict(channel.channel_options())[name] == channel.CLIENT_READ_BYTES


@contextlib.asynccontextmanager
async def far_away(port: int) -> AsyncGenerator[tuple[str, list[str]]]:
    """An address that leads to this port, `SLOW_S` behind it, and who has come there."""
    came: list[str] = []
    pipes: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(str(writer.get_extra_info("peername")))
        pipes.append(writer)
        await asyncio.sleep(SLOW_S)
        their_reader, their_writer = await asyncio.open_connection("127.0.0.1", port)
        pipes.append(their_writer)
        await asyncio.gather(carry(reader, their_writer), carry(their_reader, writer))

    server = await asyncio.start_server(lead, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", came
    finally:
        server.close()
        for pipe in pipes:
            pipe.transport.abort()


async def test_a_coordinator_that_is_far_away_is_reached_at_the_first_try() -> None:
    async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return request

    assert channel.BACKOFF_MIN_S < SLOW_S
    server = grpc.aio.server(options=channel.server_options())
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Say": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with far_away(port) as (address, came), channel.open_channel(address) as opened:
        say: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/t.T/Say")
        assert await say(b"x") == b"x"
        assert len(came) == 1
    await server.stop(None)


async def test_a_connection_without_calls_is_closed_and_the_next_call_opens_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return context.peer().encode()

    monkeypatch.setattr(channel, "IDLE_S", 1.0)
    server = grpc.aio.server(options=channel.server_options())
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Say": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with channel.open_channel(f"127.0.0.1:{port}") as opened:
        say: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/t.T/Say")
        first = await say(b"")
        while (state := opened.get_state()) != grpc.ChannelConnectivity.IDLE:
            await opened.wait_for_state_change(state)
        assert await say(b"") != first
    await server.stop(None)
