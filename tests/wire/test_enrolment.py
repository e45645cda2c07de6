"""Joining against real TLS servers: the right one, a wrong one in between, and things that are no coordinator at all."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from fleetune.errors import FleetuneError, UnreachableError
from fleetune.wire import enrolment, keys
from fleetune.wire.identity import SERVER_NAME, Identity
from fleetune.wire.joinline import JoinLine
from support.authority import DAY_S, Authority
from support.join_service import TOKEN, Door, joining

DEVICE = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def line_to(port: int, authority: Authority, token: str = TOKEN) -> JoinLine:
    return JoinLine("127.0.0.1:7433", port, authority.root_sha256, token)


async def enrolled(line: JoinLine, *, name: str = "pi-1", device_id: str = DEVICE, patience_s: float = 0.0) -> Identity:
    return await asyncio.to_thread(enrolment.enrol, line, name, device_id, patience_s=patience_s)


async def test_a_device_gets_a_certificate_for_the_key_that_it_made(authority: Authority) -> None:
    door = Door(authority)
    async with joining(door) as port:
        identity = await enrolled(line_to(port, authority))
    facts = identity.facts
    assert (facts.kind, facts.name, facts.role, facts.coordinator, facts.server_name) == (
        "agent",
        "pi-1",
        "",
        "127.0.0.1:7433",
        SERVER_NAME,
    )
    assert 29 * DAY_S < facts.not_after_unix_s - facts.not_before_unix_s < 31 * DAY_S
    assert door.joins[0].device_id == DEVICE
    assert b"PRIVATE" not in door.joins[0].SerializeToString()
    keys.check(identity)


async def test_without_a_device_id_it_is_an_operator_s(authority: Authority) -> None:
    async with joining(Door(authority)) as port:
        facts = (await enrolled(line_to(port, authority), name="anna", device_id="")).facts
    assert (facts.kind, facts.name, facts.role) == ("operator", "anna", "operate")


async def test_a_server_of_another_authority_never_sees_the_token(authority: Authority) -> None:
    door = Door(Authority("somebody in between"))
    async with joining(door) as port:
        with pytest.raises(enrolment.WrongCoordinatorError, match="another fingerprint") as caught:
            await enrolled(line_to(port, authority))
    assert door.joins == []
    assert TOKEN not in str(caught.value)


async def test_nor_does_one_that_shows_the_right_root_behind_a_certificate_of_its_own(authority: Authority) -> None:
    door = Door(Authority("somebody in between"))
    async with joining(door, root=authority.root) as port:
        with pytest.raises(enrolment.WrongCoordinatorError):
            await enrolled(line_to(port, authority))
    assert door.joins == []


@pytest.mark.parametrize("name", ["another.name", SERVER_NAME])
async def test_nor_does_an_agent_of_the_fleet_or_a_server_of_another_name(authority: Authority, name: str) -> None:
    door = Door(authority)
    leaf = authority.leaf(name) if name != SERVER_NAME else authority.leaf(name, "urn:fleetune:agent:12345678", "client")
    async with joining(door, leaf=leaf) as port:
        with pytest.raises(UnreachableError):
            await enrolled(line_to(port, authority))
    assert door.joins == []


@pytest.mark.parametrize(("begin_s", "word"), [(3600.0, "begins"), (-90 * DAY_S, "ended")])
async def test_a_wrong_clock_is_told_as_such(authority: Authority, begin_s: float, word: str) -> None:
    import time

    door = Door(authority)
    async with joining(door, leaf=authority.leaf(begin_unix_s=time.time() + begin_s)) as port:
        with pytest.raises(enrolment.JoinRefusedError, match=word) as caught:
            await enrolled(line_to(port, authority))
    assert "clock" in str(caught.value)
    assert door.joins == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "unknown, used up, expired or revoked"),
        (grpc.StatusCode.ALREADY_EXISTS, "'pi-1' is taken"),
        (grpc.StatusCode.INVALID_ARGUMENT, "refused 'pi-1'"),
        (grpc.StatusCode.UNIMPLEMENTED, "lets nobody join"),
    ],
)
async def test_a_final_no_is_told_in_clear_words_without_the_token(authority: Authority, code: grpc.StatusCode, words: str) -> None:
    door = Door(authority, answers=[(code, f"told about {TOKEN}")])
    async with joining(door) as port:
        with pytest.raises(enrolment.JoinRefusedError, match=words) as caught:
            await enrolled(line_to(port, authority), patience_s=10)
    assert len(door.joins) == 1
    assert TOKEN not in str(caught.value)
    assert TOKEN not in repr(line_to(1, authority))


async def test_a_busy_or_absent_coordinator_is_tried_again(authority: Authority) -> None:
    door = Door(authority, answers=[(grpc.StatusCode.RESOURCE_EXHAUSTED, "too fast"), (grpc.StatusCode.UNAVAILABLE, "starting")])
    async with joining(door) as port:
        await enrolled(line_to(port, authority), patience_s=120)
    assert len(door.joins) == 3


async def test_the_patience_ends(authority: Authority) -> None:
    door = Door(authority, answers=[(grpc.StatusCode.UNAVAILABLE, "starting")] * 9)
    async with joining(door) as port:
        with pytest.raises(UnreachableError, match="did not answer"):
            await enrolled(line_to(port, authority), patience_s=1)


@contextmanager
def answering(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port on which every connection is treated by `behave`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    return
                with accepted:
                    behave(accepted)

        thread = threading.Thread(target=run, name="answering")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def garbage(accepted: socket.socket) -> None:
    accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def closing(accepted: socket.socket) -> None:
    accepted.recv(1)


@pytest.mark.parametrize("behave", [garbage, closing])
async def test_a_port_of_something_else_is_told_as_such(authority: Authority, behave: Callable[[socket.socket], None]) -> None:
    with answering(behave) as port:
        with pytest.raises(UnreachableError, match="does not speak TLS"):
            await enrolled(line_to(port, authority))


def test_a_port_that_says_nothing_is_given_up(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(UnreachableError, match="did not finish the TLS handshake"):
            enrolment.fetch_root(f"127.0.0.1:{silent.getsockname()[1]}", authority.root_sha256, handshake_s=0.2)


async def test_a_plain_grpc_port_is_told_as_such(authority: Authority) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(UnreachableError):
            await enrolled(line_to(port, authority))
    finally:
        await server.stop(None)


async def test_nobody_there_is_told_as_such(authority: Authority) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UnreachableError, match="Nobody answers"):
        await enrolled(line_to(port, authority))


def test_a_certificate_for_another_key_is_refused(authority: Authority) -> None:
    mine, other = authority.agent(), authority.agent()
    with pytest.raises(FleetuneError, match="another key"):
        keys.check(Identity(mine.facts, other.key, mine.certificate, mine.roots))
    with pytest.raises(FleetuneError, match="damaged"):
        keys.check(Identity(mine.facts, mine.key, b"-----BEGIN nothing", mine.roots))
