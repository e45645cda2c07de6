"""The whole agent as a process with mutual TLS: certificates that are good, bad, renewed and revoked."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from fleetune.v1 import fleet_pb2
from fleetune.wire import identity
from support.agent_process import agent
from support.authority import DAY_S, Authority
from support.fake_coordinator import CHUNK_BYTES, FakeCoordinator, echo_task, state_bytes
from support.join_service import Door, server_credentials

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def door(authority: Authority) -> Door:
    return Door(authority)


@pytest_asyncio.fixture
async def coordinator(authority: Authority, door: Door) -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator()
    fake.credentials = server_credentials(authority.leaf(), authority.root, mutual=True)
    fake.registers = door.add_renewal
    await fake.start()
    yield fake
    await fake.stop()


async def test_an_agent_with_an_identity_works_as_one_in_plaintext_does(
    coordinator: FakeCoordinator, authority: Authority, tmp_path: Path
) -> None:
    state = coordinator.add_blob(state_bytes(300_000))
    async with agent(tmp_path / "one", coordinator.address, identity=authority.agent()) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", state))
        await coordinator.until(lambda: coordinator.finished() == ["t1"])
        await running.logged("receipt task=t1")
        assert await running.end(signal.SIGTERM) == 0
    assert "PRIVATE KEY" not in running.log


async def test_the_coordinator_of_the_join_line_is_dialled_where_no_setting_names_one(
    coordinator: FakeCoordinator, authority: Authority, tmp_path: Path
) -> None:
    mine = authority.agent(coordinator=coordinator.address)
    async with agent(tmp_path / "one", "", identity=mine):
        await coordinator.until(lambda: coordinator.sessions == 1)


@pytest.mark.parametrize(
    ("begin_s", "life_s", "word"), [(-90 * DAY_S, 30 * DAY_S, "ended on"), (DAY_S, 30 * DAY_S, "begins on")], ids=["expired", "future"]
)
async def test_a_certificate_that_is_not_good_now_is_told_and_not_tried(
    coordinator: FakeCoordinator, authority: Authority, tmp_path: Path, begin_s: float, life_s: float, word: str
) -> None:
    mine = authority.agent(begin_unix_s=time.time() + begin_s, life_s=life_s)
    async with agent(tmp_path / "one", coordinator.address, identity=mine) as running:
        await running.logged("Trying again every minute or so")
        assert word in running.log and "Set the clock" in running.log
        # Another identity in the folder is taken up without a restart.
        identity.store(tmp_path / "one" / "identity", authority.agent())
        await coordinator.until(lambda: coordinator.sessions == 1)
    assert len(coordinator.hellos) == 1


@pytest.mark.parametrize("wrong", ["foreign", "purpose", "server", "plaintext"])
async def test_a_refused_handshake_is_told_with_its_cause_and_not_tried_again_soon(
    coordinator: FakeCoordinator, authority: Authority, tmp_path: Path, wrong: str
) -> None:
    other = Authority("another fleet")
    mine = {
        "foreign": other.agent(trusts=authority),
        "purpose": authority.agent(purpose="server"),
        "server": other.agent(),
        "plaintext": authority.agent(),
    }[wrong]
    plain = FakeCoordinator()
    await plain.start()
    address = plain.address if wrong == "plaintext" else coordinator.address
    words = {"server": "no certificate that this agent trusts", "plaintext": "does not speak TLS"}
    try:
        async with agent(tmp_path / "one", address, identity=mine) as running:
            await running.logged("Trying again every minute or so")
            assert words.get(wrong, "closes the connection without a word") in running.log
            assert running.log.count("Trying again every minute or so") == 1
    finally:
        await plain.stop()
    assert coordinator.hellos == []


async def test_a_revoked_agent_is_told_what_to_do_and_stays_away(
    coordinator: FakeCoordinator, authority: Authority, tmp_path: Path
) -> None:
    async with agent(tmp_path / "one", coordinator.address, identity=authority.agent()) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.session_abort = (grpc.StatusCode.UNAUTHENTICATED, "this certificate was revoked")
        coordinator.hang_up()
        await running.logged("fleetune token create --name one --replace")
        assert len(coordinator.hellos) == 2
        assert await running.end(signal.SIGTERM) == 0


async def test_a_coordinator_that_is_only_away_is_dialled_at_the_usual_pace(
    coordinator: FakeCoordinator, authority: Authority, tmp_path: Path
) -> None:
    async with agent(tmp_path / "one", coordinator.address, identity=authority.agent()) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        await coordinator.stop()
        await running.logged("not connected, retrying")
        await running.logged("not connected, retrying", times=2)
        await coordinator.start()
        await coordinator.until(lambda: coordinator.sessions == 2)
    assert "every minute" not in running.log


async def test_a_certificate_is_renewed_under_a_running_upload_without_a_failed_transfer(
    coordinator: FakeCoordinator, authority: Authority, door: Door, tmp_path: Path
) -> None:
    state = coordinator.add_blob(state_bytes(20 * CHUNK_BYTES))
    mine = authority.agent()
    coordinator.upload_gate = asyncio.Event()
    async with agent(tmp_path / "one", coordinator.address, identity=mine) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(task=echo_task("t1", state))
        await coordinator.until(lambda: "t1" in coordinator.updates and bool(coordinator.updates["t1"].data))
        door.name, door.device_id = "one", coordinator.hellos[0].device_id
        coordinator.send(renew=fleet_pb2.RenewCertificate())
        await coordinator.until(lambda: coordinator.sessions == 2)
        coordinator.upload_gate.set()
        await coordinator.until(lambda: coordinator.finished() == ["t1"])
        await running.logged("receipt task=t1")
        coordinator.send(task=echo_task("t2", state))
        await coordinator.until(lambda: len(coordinator.finished()) == 2)
        await running.logged("receipt task=t2")
        assert await running.end(signal.SIGTERM) == 0
    assert "transfer cut" not in running.log
    # It went over to a new connection on purpose, which nobody needs to look into.
    assert re.search(r"INFO .*reconnecting .*reason='the certificate is a new one'", running.log)
    assert "disconnected" not in running.log and "WARNING" not in running.log
    assert coordinator.updates["t1"].streams == 1
    assert coordinator.peers[0] != coordinator.peers[1]
    renewed = identity.load(tmp_path / "one" / "identity")
    assert renewed is not None and renewed.certificate != mine.certificate and renewed.key != mine.key
    assert (tmp_path / "one" / "identity" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert re.search(r"certificate renewed name=one days=(29|30)", running.log)


async def test_a_certificate_is_renewed_by_itself_when_two_thirds_of_its_life_are_over(
    coordinator: FakeCoordinator, authority: Authority, door: Door, tmp_path: Path
) -> None:
    door.answers = [(grpc.StatusCode.UNAVAILABLE, "not now")]
    mine = authority.agent(begin_unix_s=time.time() - 800, life_s=1000)
    async with agent(tmp_path / "one", coordinator.address, identity=mine) as running:
        await running.logged("certificate not renewed")
        await running.logged("certificate renewed")
        await coordinator.until(lambda: coordinator.sessions == 2)
    assert len(door.renewals) == 2


async def test_a_renewed_certificate_that_does_not_fit_is_not_stored(
    coordinator: FakeCoordinator, authority: Authority, door: Door, tmp_path: Path
) -> None:
    door.name = "another"
    mine = authority.agent()
    async with agent(tmp_path / "one", coordinator.address, identity=mine) as running:
        await coordinator.until(lambda: coordinator.sessions == 1)
        coordinator.send(renew=fleet_pb2.RenewCertificate())
        await running.logged("is for 'another', not for 'one'")
    assert identity.load(tmp_path / "one" / "identity") == mine


async def test_without_identity_and_without_plaintext_it_says_how_to_join(tmp_path: Path) -> None:
    async with agent(tmp_path / "one", "127.0.0.1:1", plaintext=False) as running:
        assert await running.ended() == 2
    assert "fleetune-agent join" in running.log and "--plaintext" in running.log
