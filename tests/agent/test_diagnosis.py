"""What a handshake of our own finds at an address, with real servers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from fleetune.agent import diagnosis
from fleetune.wire import identity
from fleetune.wire.identity import Identity
from support.authority import DAY_S, Authority, Leaf
from support.join_service import server_credentials


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that takes too long finds nothing; here the other end may take as long as a busy machine makes it."""
    monkeypatch.setattr(diagnosis, "LOOK_S", 60.0)


@contextlib.asynccontextmanager
async def serving(authority: Authority, leaf: Leaf | None = None) -> AsyncIterator[str]:
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", server_credentials(leaf or authority.leaf(), authority.root, mutual=True))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def answering(data: bytes) -> AsyncIterator[str]:
    """Says this to whoever comes, then hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def looked(folder: Path, address: str, own: Identity) -> diagnosis.Finding:
    identity.store(folder, own)
    return await diagnosis.look(address, own, folder)


async def test_a_sound_coordinator_stands_in_nobody_s_way(tmp_path: Path, authority: Authority) -> None:
    async with serving(authority) as address:
        assert await looked(tmp_path, address, authority.agent()) == diagnosis.SOUND


@pytest.mark.parametrize("case", ["expired", "future", "foreign", "purpose"])
async def test_a_certificate_that_is_refused_is_told_as_such(tmp_path: Path, authority: Authority, case: str) -> None:
    now = time.time()
    own = {
        "expired": authority.agent(begin_unix_s=now - 90 * DAY_S),
        "future": authority.agent(begin_unix_s=now + DAY_S),
        "foreign": Authority().agent(trusts=authority),
        "purpose": authority.agent(purpose="server"),
    }[case]
    async with serving(authority) as address:
        finding = await looked(tmp_path, address, own)
    assert "closes the connection without a word" in finding.refused and "join --again" in finding.remedy


async def test_a_server_that_is_not_the_fleet_s_is_told_as_such(tmp_path: Path, authority: Authority) -> None:
    other = Authority()
    async with serving(other) as address:
        assert "no certificate that this agent trusts" in (await looked(tmp_path, address, authority.agent())).refused
    async with serving(authority, authority.leaf(begin_unix_s=time.time() - 90 * DAY_S)) as address:
        assert "expired" in (await looked(tmp_path, address, authority.agent())).refused


async def test_a_port_without_tls_is_told_as_such(tmp_path: Path, authority: Authority) -> None:
    async with answering(b"hello, this is something else entirely\n") as address:
        assert "does not speak TLS" in (await looked(tmp_path, address, authority.agent())).refused


async def test_a_proxy_without_its_coordinator_and_nobody_at_all_are_only_away(tmp_path: Path, authority: Authority) -> None:
    async with answering(b"") as address:
        assert await looked(tmp_path, address, authority.agent()) == diagnosis.SOUND
    assert await looked(tmp_path, "127.0.0.1:1", authority.agent()) == diagnosis.SOUND


async def test_damaged_files_are_told_as_such(tmp_path: Path, authority: Authority) -> None:
    identity.store(tmp_path, authority.agent())
    (tmp_path / identity.CERTIFICATE_FILE).write_bytes(b"damaged")
    assert "cannot be used" in (await diagnosis.look("127.0.0.1:1", authority.agent(), tmp_path)).refused
