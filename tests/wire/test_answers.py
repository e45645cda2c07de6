"""What the other end says of a call that it ended early reaches the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from fleetune.wire.answers import Answer, let_go

CALLS = 500
WAIT_S = 30.0


@pytest.fixture
async def address() -> AsyncIterator[str]:
    async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        async for _ in requests:
            break
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")

    async def say_and_refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async for _ in requests:
            break
        for _ in range(8):
            await context.write(b"y" * 1000)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")

    async def refuse_at_once(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not you")

    server = grpc.aio.server()
    closed: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(refuse_at_once)
    both: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(say_and_refuse)
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Put": handler, "Talk": both, "Closed": closed}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def _method(channel: grpc.aio.Channel, name: str) -> grpc.aio.StreamUnaryMultiCallable[bytes, bytes]:
    return channel.stream_unary(f"/t.T/{name}")


async def test_a_refusal_in_the_middle_of_a_stream_is_heard_as_what_it_was(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:

        async def once() -> tuple[grpc.StatusCode, str | None]:
            call = _method(channel, "Put")()
            answer = Answer(call)
            try:
                for _ in range(64):
                    try:
                        await call.write(b"x" * 65536)
                    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                        break
                await call
            except grpc.aio.AioRpcError as error:
                told = answer.of(error)
                return told.code(), told.details()
            raise AssertionError("The call was not refused.")

        heard = [await asyncio.wait_for(once(), WAIT_S) for _ in range(CALLS)]
    assert set(heard) == {(grpc.StatusCode.FAILED_PRECONDITION, "not now")}


async def test_a_refusal_before_the_first_word_is_heard_as_what_it_was(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        knock: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/t.T/Closed")

        async def once(pause: int) -> tuple[grpc.StatusCode, str | None]:
            call = knock()
            answer = Answer(call)
            try:
                # Some are refused before the write begins, some while it is under way, some after it.
                for _ in range(pause):
                    await asyncio.sleep(0)
                await answer.heard(call.write(b"x"))
                await answer.heard(call.read())
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details()
            finally:
                let_go(call)
            raise AssertionError("The call was not refused.")

        heard = [await asyncio.wait_for(once(count % 40), WAIT_S) for count in range(CALLS)]
    assert set(heard) == {(grpc.StatusCode.UNAUTHENTICATED, "not you")}


async def test_what_goes_well_is_heard_as_it_is(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        talk: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/t.T/Talk")
        call = talk()
        answer = Answer(call)
        await answer.heard(call.write(b"x"))
        assert answer.error() is None
        assert await answer.heard(call.read()) == b"y" * 1000
        let_go(call)


async def test_an_error_of_this_end_stays_what_it_is(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        call = _method(channel, "None")()
        answer = Answer(call)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert answer.of(caught.value) is caught.value
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_call_whose_write_failed_leaves_no_task_behind_though_messages_lie_unread(address: str) -> None:
    """Leaked tasks fail the test."""
    async with grpc.aio.insecure_channel(address) as channel:
        talk: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/t.T/Talk")
        for _ in range(CALLS // 5):
            call = talk()
            try:
                for _ in range(200):
                    await asyncio.wait_for(call.write(b"x" * 4096), WAIT_S)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            let_go(call)
