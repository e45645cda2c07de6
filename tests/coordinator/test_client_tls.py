"""The operator's client over mutual TLS: the right identity, and words for the wrong ones."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.coordinator.client import Client
from fleetune.errors import ConfigError, UnreachableError
from fleetune.v1 import control_pb2 as pb
from fleetune.wire.identity import Identity
from support import control_service, job_views
from support.authority import DAY_S, Authority
from support.control_service import Fleet, serving
from support.join_service import server_credentials


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def running() -> Fleet:
    view = job_views.job(pb.JOB_STATE_COMPLETED, ended_after_s=9)
    return Fleet(jobs={view.job_id: view}, adapter=control_service.adapter_files())


async def test_calls_and_downloads_go_over_tls_with_the_operator_s_certificate(authority: Authority, tmp_path: Path) -> None:
    credentials = server_credentials(authority.leaf(), authority.root, mutual=True)
    async with serving(running(), credentials=credentials) as address, Client(address, authority.agent()) as client:
        (job,) = await client.jobs()
        await client.export(job.job_id, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == control_service.adapter_files()["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("foreign", "closed the connection when it saw the certificate of 'one'"),
        ("expired", "closed the connection when it saw the certificate of 'one'"),
        ("server", "has no certificate from the authority of your identity"),
        ("none", "does not speak plaintext"),
    ],
)
async def test_a_wrong_identity_is_told_as_such(authority: Authority, wrong: str, words: str) -> None:
    other = Authority("another fleet")
    identities: dict[str, Identity | None] = {
        "foreign": other.agent(trusts=authority),
        "expired": authority.agent(begin_unix_s=time.time() - 90 * DAY_S),
        "server": other.agent(),
        "none": None,
    }
    credentials = server_credentials(authority.leaf(), authority.root, mutual=True)
    async with serving(running(), credentials=credentials) as address, Client(address, identities[wrong]) as client:
        with pytest.raises(UnreachableError, match=words):
            await client.jobs()


@contextlib.contextmanager
def hanging_up(authority: Authority, folder: Path) -> Iterator[str]:
    """A coordinator that ends the connection after the handshake, once more has come, which it leaves unread."""
    leaf = authority.leaf()
    (folder / "server.pem").write_bytes(leaf.certificate + authority.root)
    (folder / "server.key").write_bytes(leaf.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.set_alpn_protocols(["h2"])

    def run(listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), context.wrap_socket(accepted, server_side=True) as shaken:
                select.select([shaken], [], [], 60)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, args=(listener,), name="hanging up")
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


async def test_a_hang_up_that_meets_the_first_words_is_told_as_any_other(authority: Authority, tmp_path: Path) -> None:
    with hanging_up(authority, tmp_path) as address:
        async with Client(address, authority.agent()) as client:
            with pytest.raises(UnreachableError, match="closed the connection when it saw the certificate of 'one'"):
                await client.jobs()


async def test_a_coordinator_in_plaintext_is_told_as_such(authority: Authority) -> None:
    async with serving(running()) as address, Client(address, authority.agent()) as client:
        with pytest.raises(UnreachableError, match="does not speak TLS"):
            await client.jobs()


async def test_nobody_there_is_told_as_such_with_an_identity_too(authority: Authority) -> None:
    async with Client(control_service.dead_address(), authority.agent()) as client:
        with pytest.raises(UnreachableError, match="no coordinator answers"):
            await client.jobs()


def test_without_an_identity_no_other_machine_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7:7433 is not this machine"):
        Client("192.0.2.7:7433")
