"""When the coordinator reads its TLS files again: as a handshake begins, when it is told to, and never just so."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fleetune.coordinator import entrance, rotation, tlsfolder
from fleetune.coordinator.config import TlsFiles
from fleetune.coordinator.entrance import Follower, Shown, Tls
from fleetune.coordinator.faults import FolderInUseError
from fleetune.coordinator.handshakes import Offer
from fleetune.errors import ConfigError
from support.authority import DAY_S, Authority
from support.coordinating import WAIT_S, coordinating, settings
from support.guarded import guarding
from support.secured import secured


class Files:
    """What a `Tls` reads, set by the test, and how often it was looked at."""

    def __init__(self) -> None:
        self.text = b"one"
        self.wrong: Exception | None = None
        self.looks = 0
        self.reads: list[float] = []

    def mark(self) -> object:
        self.looks += 1
        return self.text

    def read(self, patience_s: float) -> Shown:
        self.reads.append(patience_s)
        if self.wrong is not None:
            raise self.wrong
        return Shown(Offer(b"key", self.text, b"roots"), None)


class News(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def test_a_handshake_looks_and_reads_only_what_has_changed() -> None:
    files, news = Files(), News()
    tls = Tls(files.read, files.mark)
    tls.on_news(news)
    for _ in range(3):
        tls._look()
    assert (files.looks, len(files.reads)) == (4, 1)
    files.text = b"two"
    for _ in range(3):
        tls._look()
    assert (files.looks, len(files.reads)) == (7, 2)
    assert (tls._shown.offer.chain, tls.handshakes._offer.chain, news) == (b"two", b"two", [""])


def test_files_that_cannot_be_used_are_told_once_and_the_former_go_on() -> None:
    files, news = Files(), News()
    tls = Tls(files.read, files.mark)
    tls.on_news(news)
    files.text, files.wrong = b"two", ConfigError("it is not its certificate.", "Mend it.")
    for _ in range(3):
        tls._look()
    assert tls._shown.offer.chain == b"one"
    assert [("not its certificate" in text) for text in news] == [True]
    files.text, files.wrong = b"three", None
    tls._look()
    assert tls._shown.offer.chain == b"three"


def test_a_handshake_waits_for_no_writer_and_the_next_one_looks_again() -> None:
    files, news = Files(), News()
    tls = Tls(files.read, files.mark)
    tls.on_news(news)
    files.text, files.wrong = b"two", FolderInUseError("it is being changed.", "Wait.")
    tls._look()
    assert (files.reads[-1], tls._shown.offer.chain, news) == (0.0, b"one", [])
    files.wrong = None
    tls._look()
    assert tls._shown.offer.chain == b"two"


def test_a_handshake_does_not_wait_for_another_one_that_reads() -> None:
    files = Files()
    tls = Tls(files.read, files.mark)
    with tls._lock:
        tls._look()
    assert files.looks == 1


def test_half_of_a_rotation_is_never_read(tmp_path: Path) -> None:
    tlsfolder.make(tmp_path, "", time.time())
    folder = tlsfolder.of(tmp_path)
    with (folder / tlsfolder.LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError):
            tlsfolder.read_whole(folder, 0.0)
    assert tlsfolder.read_whole(folder, 0.0).address == ""


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  # what nobody announces
        await asyncio.sleep(0.001)


class Waits(list[float]):
    """Takes the place of the follower's wait: notes for how long, and lets nothing happen so often."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._times = times

    async def __call__(self, event: asyncio.Event, within_s: float) -> bool:
        self.append(within_s)
        if len(self) > self._times:
            await asyncio.Event().wait()
        return False


@contextlib.asynccontextmanager
async def following(tls: Tls, folder: Path) -> AsyncGenerator[Follower]:
    nobody = cast("Any", None)  # Any: whom it has to do with only after a change
    follower = Follower(tls, folder, nobody, nobody)
    running = asyncio.create_task(follower.run())
    try:
        yield follower
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_between_handshakes_nothing_looks_at_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrance, "happened", waits := Waits(5))
    files = Files()
    async with following(Tls(files.read, files.mark), tmp_path):
        await until(lambda: len(waits) > 5)
    assert (files.looks, len(files.reads)) == (1, 1)
    assert set(waits) == {entrance.SLEEP_S_MAX}


async def test_whoever_says_so_gets_the_files_read_again_changed_or_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files = Files()
    async with following(Tls(files.read, files.mark), tmp_path) as follower:
        for _ in range(2):
            caplog.clear()
            follower.reload()
            await until(lambda: "reloaded: " in caplog.text)
        assert len(files.reads) == 3
        caplog.clear()
        files.wrong = ConfigError("they are damaged.", "Mend them.")
        follower.reload()
        await until(lambda: "they are damaged" in caplog.text)
    assert files.reads[1:] == [entrance.WRITER_S] * 3
    assert "reloaded: " not in caplog.text


async def test_the_server_s_certificate_is_renewed_when_it_is_time_and_shown_from_then_on(tmp_path: Path) -> None:
    made = time.time() - 300 * DAY_S
    tlsfolder.make(tmp_path, "", made)
    tls = entrance.open_tls(settings(tmp_path, plaintext=False), made)
    assert tls is not None
    before = tls._shown.offer.chain
    assert tls.renew_unix_s < time.time()
    async with following(tls, tlsfolder.of(tmp_path)):
        await until(lambda: tls.renew_unix_s > time.time())
    assert tls._shown.offer.chain != before
    assert tls.handshakes._offer.chain == (tlsfolder.of(tmp_path) / tlsfolder.SERVER_CERTIFICATE).read_bytes()


async def test_a_renewal_that_fails_is_tried_again_later_and_not_in_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    made = time.time() - 300 * DAY_S
    tlsfolder.make(tmp_path, "", made)
    tls = entrance.open_tls(settings(tmp_path, plaintext=False), made)
    assert tls is not None
    monkeypatch.setattr(entrance, "happened", waits := Waits(2))
    monkeypatch.setattr(tlsfolder, "mend", full)
    async with following(tls, tlsfolder.of(tmp_path)):
        await until(lambda: len(waits) >= 3)
    assert waits == [0.0, entrance.MEND_AGAIN_S, entrance.MEND_AGAIN_S]
    assert "could not be renewed" in caplog.text


# --- a whole coordinator


def shown_to(address: str, roots: bytes, certificate: bytes, key: bytes, folder: Path) -> str:
    """What the coordinator shows to somebody who connects now: the hex serial number of its certificate."""
    for name, data in (("who.pem", certificate), ("who.key", key)):
        (folder / name).write_bytes(data)
    context = ssl.create_default_context(cadata=roots.decode("ascii"))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(folder / "who.pem", folder / "who.key")
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw, context.wrap_socket(raw) as secure:
        found = secure.getpeercert()
    assert found is not None
    return str(found["serialNumber"])


async def test_files_of_another_authority_that_change_are_shown_to_the_next_who_connects(tmp_path: Path) -> None:
    company = Authority()
    mine = company.agent()

    def put() -> None:
        leaf = company.leaf()
        for name, data in (("roots.pem", company.root), ("server.key", leaf.key), ("server.pem", leaf.certificate)):
            (tmp_path / f"new-{name}").write_bytes(data)
            (tmp_path / f"new-{name}").chmod(0o600)
            os.replace(tmp_path / f"new-{name}", tmp_path / name)

    put()
    files = TlsFiles(tmp_path / "roots.pem", tmp_path / "server.pem", tmp_path / "server.key")
    async with coordinating(tmp_path / "state", plaintext=False, tls=files, as_operator=mine) as coordinator:
        who = (coordinator.address, company.root, mine.certificate, mine.key, tmp_path)
        before = [await asyncio.to_thread(shown_to, *who) for _ in range(2)]
        await asyncio.to_thread(put)
        after = [await asyncio.to_thread(shown_to, *who) for _ in range(2)]
    assert before[0] == before[1] != after[0] == after[1]


async def test_a_device_is_told_to_renew_where_the_roots_have_changed_now_or_when_it_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: asyncio.Queue[str] = asyncio.Queue()
    async with guarding(tmp_path / "state") as place:
        monkeypatch.setattr(place.running.fleet, "ask_to_renew", told.put_nowait)
        oak = await place.enrol("oak", "device-oak")
        agent = place.agent(oak, "oak")
        async with agent:
            assert told.empty()
            await asyncio.to_thread(rotation.begin, tmp_path / "state")
            assert place.running.follower is not None
            place.running.follower.reload()
            assert await asyncio.wait_for(told.get(), WAIT_S) == "device-oak"
        async with agent:
            assert await asyncio.wait_for(told.get(), WAIT_S) == "device-oak"
        # One that has joined since then has nothing to renew.
        elm = await place.enrol("elm", "device-elm")
        async with place.agent(elm, "elm"):
            assert told.empty()


async def test_a_rotation_is_in_force_for_whoever_connects_next_without_anybody_s_word(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        made = await asyncio.to_thread(rotation.begin, tmp_path / "state")
        assert not made.told  # nobody holds this folder's lock
        await fleet.serves(fleet.admin)
        tls = fleet.coordinator.running.tls
        assert tls is not None and tls.authority is not None
        assert tls.authority.fingerprint == made.root_fingerprint
