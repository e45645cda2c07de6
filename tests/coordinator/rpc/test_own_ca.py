"""Certificates of another authority than the fleet's own."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from fleetune.coordinator.config import TlsFiles
from fleetune.errors import ConfigError
from fleetune.v1 import registry_pb2 as pb
from fleetune.v1 import registry_pb2_grpc
from fleetune.wire import channel
from fleetune.wire.identity import SERVER_NAME, Facts, Identity
from support.authority import Authority
from support.coordinating import coordinating

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
            await stub.RevokeIdentity(pb.RevokeIdentityRequest(kind=pb.IDENTITY_KIND_OPERATOR, name=revoke), timeout=10.0)
        else:
            await stub.ListTokens(pb.ListTokensRequest(), timeout=10.0)
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
