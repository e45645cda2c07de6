"""The notify protocol, spoken to a real socket of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.supervisor import Supervisor


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


def environment_of(listener: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": listener.getsockname(), "PATH": "/bin", **more}


async def message(listener: socket.socket) -> str:
    return (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(listener, 4096), 10)).decode()


def test_readiness_and_the_end_are_told_with_words(heard: socket.socket) -> None:
    supervisor = Supervisor.from_environment(environment_of(heard))
    supervisor.ready("listens on 127.0.0.1:7433")
    supervisor.stopping("lets uploads end")
    assert heard.recv(4096) == b"READY=1\nSTATUS=listens on 127.0.0.1:7433"
    assert heard.recv(4096) == b"STOPPING=1\nSTATUS=lets uploads end"


def test_children_inherit_nothing_of_the_supervisor(heard: socket.socket) -> None:
    environment = environment_of(heard, WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid()))
    Supervisor.from_environment(environment)
    assert environment == {"PATH": "/bin"}


def test_without_a_supervisor_nothing_is_sent_and_nothing_fails() -> None:
    supervisor = Supervisor.from_environment({"WATCHDOG_USEC": "30000000"})
    supervisor.ready("up")
    supervisor.stopping("down")
    assert supervisor.watchdog_s == 0.0


def test_the_period_of_the_watchdog_is_in_microseconds(heard: socket.socket) -> None:
    assert Supervisor.from_environment(environment_of(heard, WATCHDOG_USEC="30000000")).watchdog_s == 30.0


@pytest.mark.parametrize("period", ["", "soon", "-5", "1.5"])
def test_a_period_that_is_no_number_means_no_watchdog(heard: socket.socket, period: str) -> None:
    assert Supervisor.from_environment(environment_of(heard, WATCHDOG_USEC=period)).watchdog_s == 0.0


def test_a_watchdog_of_another_process_is_not_ours(heard: socket.socket) -> None:
    environment = environment_of(heard, WATCHDOG_USEC="30000000", WATCHDOG_PID="7")
    assert Supervisor.from_environment(environment, pid=8).watchdog_s == 0.0


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative/notify"])
def test_an_address_that_is_no_socket_of_this_machine_is_left_alone(address: str) -> None:
    supervisor = Supervisor.from_environment({"NOTIFY_SOCKET": address})
    supervisor.ready("up")
    assert supervisor.watchdog_s == 0.0


@pytest.mark.skipif(not os.path.exists("/proc/net/unix"), reason="abstract sockets are Linux's")
def test_an_abstract_socket_is_reached() -> None:
    name = f"fleetune-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(10)
        Supervisor.from_environment({"NOTIFY_SOCKET": f"@{name}"}).ready("up")
        assert listener.recv(4096) == b"READY=1\nSTATUS=up"


async def test_pings_come_thrice_a_period_and_tell_what_has_changed(heard: socket.socket) -> None:
    supervisor = Supervisor.from_environment(environment_of(heard, WATCHDOG_USEC="30000"))
    words = ["idle"]
    supervisor.ready("idle")
    watching = asyncio.create_task(supervisor.watch(lambda: words[0]))
    assert await message(heard) == "READY=1\nSTATUS=idle"
    assert await message(heard) == "WATCHDOG=1"
    words[0] = "trains t7"
    while (told := await message(heard)) == "WATCHDOG=1":  # some may have been under way
        pass
    assert told == "WATCHDOG=1\nSTATUS=trains t7"
    assert await message(heard) == "WATCHDOG=1"
    watching.cancel()
    await asyncio.wait({watching})


async def test_a_loop_that_is_stuck_does_not_ping(heard: socket.socket) -> None:
    supervisor = Supervisor.from_environment(environment_of(heard, WATCHDOG_USEC="30000"))
    watching = asyncio.create_task(supervisor.watch(lambda: "idle"))
    await message(heard)
    with contextlib.suppress(BlockingIOError):
        while True:
            heard.recv(4096)
    time.sleep(0.1)  # noqa: ASYNC251  # blocks the loop for three periods, as a bug would
    with pytest.raises(BlockingIOError):
        heard.recv(4096)
    assert await message(heard) == "WATCHDOG=1"  # and once it goes on, so do they
    watching.cancel()
    await asyncio.wait({watching})


def test_a_status_is_one_short_line_so_that_it_cannot_say_anything_else(heard: socket.socket) -> None:
    Supervisor.from_environment(environment_of(heard)).ready("job\nWATCHDOG=trigger " + "x" * 1000)
    first, second = heard.recv(4096).decode().split("\n")
    assert first == "READY=1"
    assert second.startswith("STATUS=job WATCHDOG=trigger x") and len(second) < 300


def test_a_socket_that_is_gone_is_complained_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor(str(tmp_path / "gone"))
    supervisor.ready("up")
    supervisor.stopping("down")
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1


def test_a_supervisor_that_does_not_read_stops_nobody(heard: socket.socket) -> None:
    supervisor = Supervisor.from_environment(environment_of(heard))
    for _ in range(5000):  # more than any queue takes
        supervisor.ready("up")
