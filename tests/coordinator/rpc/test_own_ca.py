"""Certificates of another authority than the fleet's own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import grpc
import pytest

from fleetune.coordinator.config import TlsFiles
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.errors import ConfigError
from fleetune.v1 import registry_pb2 as pb
from fleetune.v1 import registry_pb2_grpc
from fleetune.wire import channel
from fleetune.wire.identity import SERVER_NAME, Facts, Identity
from support.authority import Authority
from support.coordinating import WAIT_S, coordinating, echo_job

CODE = grpc.StatusCode


@pytest.fixture
def foreign() -> Authority:
    return Authority()


def written(folder: Path, authority: Authority) -> TlsFiles:
    leaf = authority.leaf()
    for name, data in (("roots.pem", authority.root), ("server.pem", leaf.certificate), ("server.key", leaf.key)):
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return TlsFiles(folder / "roots.pem", folder / "server.pem", folder / "server.key")


def operator(authority: Authority, name: str) -> Identity:
    leaf = authority.leaf(name, "urn:fleetune:operator:admin", "client")
    facts = Facts("operator", name, "admin", "", SERVER_NAME, leaf.not_before_unix_s, leaf.not_after_unix_s)
    return Identity(facts, leaf.key, leaf.certificate, authority.root)


async def asked(address: str, who: Identity, revoke: str = "") -> grpc.StatusCode:
    opened = channel.open_channel(address, who)
    stub = registry_pb2_grpc.RegistryServiceStub(opened)
    try:
        if revoke:
            await stub.RevokeIdentity(pb.RevokeIdentityRequest(kind=pb.IDENTITY_KIND_OPERATOR, name=revoke), timeout=WAIT_S)
        else:
            await stub.ListTokens(pb.ListTokensRequest(), timeout=WAIT_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        await opened.close()
    return CODE.OK


async def test_certificates_of_another_authority_are_taken_by_name_and_revoked_by_name_for_good(tmp_path: Path, foreign: Authority) -> None:
    files = written(tmp_path, foreign)
    ada, grace = (operator(foreign, name) for name in ("ada", "grace"))
    async with coordinating(tmp_path / "state", as_operator=ada, plaintext=False, tls=files) as coordinator:
        assert coordinator.running.join_port == 0
        assert await asked(coordinator.address, grace) is CODE.OK
        assert await asked(coordinator.address, ada, revoke="grace") is CODE.OK
        assert await asked(coordinator.address, grace) is CODE.UNAUTHENTICATED
    async with coordinating(tmp_path / "state", as_operator=ada, plaintext=False, tls=files) as coordinator:
        assert await asked(coordinator.address, grace) is CODE.UNAUTHENTICATED
        # Another certificate of that name is refused, too.
        assert await asked(coordinator.address, operator(foreign, "grace")) is CODE.UNAUTHENTICATED
        assert await asked(coordinator.address, ada) is CODE.OK


async def test_nobody_joins_or_renews_where_another_authority_makes_the_certificates(tmp_path: Path, foreign: Authority) -> None:
    ada = operator(foreign, "ada")
    async with coordinating(tmp_path / "state", as_operator=ada, plaintext=False, tls=written(tmp_path, foreign)) as coordinator:
        stub = registry_pb2_grpc.RegistryServiceStub(coordinator.operator)
        for call in (
            stub.CreateToken(pb.CreateTokenRequest(kind=pb.IDENTITY_KIND_AGENT, uses=1, ttl_s=600)),
            stub.Renew(pb.RenewRequest(signing_request=b"x")),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="authority of its own") as caught:
                await call
            assert caught.value.code() is CODE.FAILED_PRECONDITION


async def test_a_key_that_others_can_read_is_refused(tmp_path: Path, foreign: Authority) -> None:
    files = written(tmp_path, foreign)
    files.key.chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        async with coordinating(tmp_path / "state", plaintext=False, tls=files):
            pass


async def test_a_certificate_of_another_key_is_refused(tmp_path: Path, foreign: Authority) -> None:
    files = written(tmp_path, foreign)
    files.certificate.write_bytes(foreign.leaf().certificate)
    with pytest.raises(ConfigError, match="is not the certificate of"):
        async with coordinating(tmp_path / "state", plaintext=False, tls=files):
            pass


async def fleetune(*words: str) -> tuple[int, str, str]:
    """A verb as a person types it: exit code, standard output, standard error."""
    command = (sys.executable, "-m", "fleetune.coordinator.cli", *words)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLEETUNE_")}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment
    )
    told, wrong = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode(), wrong.decode()


async def test_an_operator_brings_a_certificate_and_may_do_what_it_says(tmp_path: Path, foreign: Authority) -> None:
    files, mine = written(tmp_path, foreign), str(tmp_path / "identity")
    leaf = foreign.leaf("grace", "urn:fleetune:operator:view", "client")
    for name, data in (("grace.pem", leaf.certificate), ("grace.key", leaf.key)):
        (tmp_path / name).write_bytes(data)
    bring = ["join", "--certificate", str(tmp_path / "grace.pem"), "--key", str(tmp_path / "grace.key"), "--roots", str(files.roots)]
    async with coordinating(tmp_path / "state", as_operator=operator(foreign, "ada"), plaintext=False, tls=files) as coordinator:
        await coordinator.submit(echo_job(), "the-job-that-waits")
        code, told, wrong = await fleetune(*bring, "--coordinator", coordinator.address, "--identity", mine)
        assert (code, told, wrong) == (0, f"{mine}: operator grace, role view, of the coordinator at {coordinator.address}\n", "")
        assert (tmp_path / "identity" / "key.pem").stat().st_mode & 0o777 == 0o600
        code, told, _ = await fleetune("jobs", "--json", "--identity", mine)
        assert (code, [job["name"] for job in json.loads(told)["jobs"]]) == (0, ["echo"])
        code, _, wrong = await fleetune("cancel", "last", "--identity", mine)
        assert code == ExitCode.REFUSED and "operate" in wrong
        code, _, wrong = await fleetune(*bring, "--coordinator", coordinator.address, "--identity", mine)
        assert code != 0 and "--again" in wrong
    for words, why in (
        (bring, "--coordinator HOST:PORT is needed"),
        ([*bring[:-2], "--coordinator", "a:1"], "belong together"),
        ([*bring, "--coordinator", "nowhere"], "is not HOST:PORT"),
        (["join", "--server-name", "x"], "go with --certificate"),
    ):
        code, _, wrong = await fleetune(*words, "--identity", str(tmp_path / "another"))
        assert code == ExitCode.USAGE and why in wrong
