"""Certificates of another authority: the names in them count, and revocation is by name."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from fleetune.v1 import control_pb2, registry_pb2
from support.certificates import Authority, Pair
from support.echo_agent import EchoAgent
from support.guarded import Guarded, guarding

Status = grpc.StatusCode
DOCS = Path(__file__).resolve().parents[3] / "docs" / "security.md"


async def greeted(place: Guarded, pair: Pair, name: str, device_id: str) -> Status:
    agent: EchoAgent = place.agent(pair, name, device_id=device_id)
    try:
        await agent.connect()
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        await agent.cut()
    return Status.OK


async def offline(place: Guarded) -> None:
    while place.running.fleet.lines:  # noqa: ASYNC110  # a dictionary that nobody announces
        await asyncio.sleep(0.01)


async def test_a_name_is_bound_to_the_first_id_that_comes_with_it_also_over_a_restart(tmp_path: Path) -> None:
    brought = Authority("an authority of a company")
    oak, elm = brought.agent("oak"), brought.agent("elm")
    async with guarding(tmp_path / "state", brought) as place:
        assert await greeted(place, oak, "oak", "device-oak") == Status.OK
        await offline(place)
        assert await greeted(place, elm, "elm", "device-oak") == Status.PERMISSION_DENIED
        assert await greeted(place, oak, "oak", "device-elm") == Status.PERMISSION_DENIED
    async with guarding(tmp_path / "state", brought) as place:
        assert await greeted(place, elm, "elm", "device-oak") == Status.PERMISSION_DENIED
        assert await greeted(place, oak, "oak", "device-oak") == Status.OK


async def test_a_revoked_name_is_out_whatever_certificate_it_shows_and_stays_out(tmp_path: Path) -> None:
    brought = Authority()
    admin = brought.operator("ann")
    async with guarding(tmp_path / "state", brought) as place:
        assert await greeted(place, brought.agent("oak"), "oak", "device-oak") == Status.OK
        request = registry_pb2.RevokeIdentityRequest(kind=registry_pb2.IDENTITY_KIND_AGENT, name="oak")
        await place.registry(admin).RevokeIdentity(request)
        assert await greeted(place, brought.agent("oak"), "oak", "device-oak") == Status.UNAUTHENTICATED
    async with guarding(tmp_path / "state", brought) as place:
        assert await greeted(place, brought.agent("oak", "device-oak"), "oak", "device-oak") == Status.UNAUTHENTICATED
        assert (await place.control(admin).ListDevices(control_pb2.ListDevicesRequest())).devices[0].revoked


async def test_nobody_joins_or_renews_where_certificates_are_made_elsewhere(tmp_path: Path) -> None:
    brought = Authority()
    async with guarding(tmp_path / "state", brought) as place:
        assert place.running.join_port == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await place.registry(brought.agent("oak")).Renew(registry_pb2.RenewRequest(signing_request=b"x"))
        assert caught.value.code() == Status.FAILED_PRECONDITION


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_the_commands_of_the_documentation_make_a_certificate_that_is_taken(tmp_path: Path) -> None:
    brought = Authority()
    (tmp_path / "ca.pem").write_bytes(brought.root)
    (tmp_path / "ca.key").write_bytes(brought.key)
    found = re.search(r"```\n(openssl req .*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    subprocess.run(["sh", "-ec", found[1]], cwd=tmp_path, check=True, capture_output=True)  # noqa: ASYNC221  # nothing else runs yet
    pair = Pair((tmp_path / "key.pem").read_bytes(), (tmp_path / "certificate.pem").read_bytes())
    async with guarding(tmp_path / "state", brought) as place:
        assert await greeted(place, pair, "kitchen-pi", "device-kitchen") == Status.OK
