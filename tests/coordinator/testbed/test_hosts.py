"""Hosts in namespaces: what they are held to, and that nothing of them stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed.hosts import Host, Hosts, Link
from fleetune.coordinator.testbed.limits import Group, Limits

MIB = 1 << 20
PAYLOAD_BYTES = 400_000
_RECEIVE = """
import socket, time
server = socket.socket()
server.bind(("0.0.0.0", 9999))
server.listen()
print("ready", flush=True)
peer, _ = server.accept()
while peer.recv(65536):
    pass
print(time.monotonic())
"""


def _may() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    tried = subprocess.run(["ip", "netns", "add", f"ft{os.getpid()}-try"], capture_output=True, check=False)
    if tried.returncode == 0:
        subprocess.run(["ip", "netns", "del", f"ft{os.getpid()}-try"], check=True)
    return tried.returncode == 0


needs_namespaces = pytest.mark.skipif(not _may(), reason="network namespaces need root and iproute2")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    pair = [Host("server", Limits(1.0)), Host("board", Limits(0.5, 128 * MIB), Link(2e6, 8e6))]
    with Hosts(pair, prefix=f"ftt{os.getpid()}") as made:
        yield made


def _rate_bits_per_s(hosts: Hosts, source: str, target: str) -> float:
    server = subprocess.Popen(hosts.command(target, [sys.executable, "-c", _RECEIVE]), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server, server.stdout:
        assert server.stdout.readline() == "ready\n"
        # One clock for both. Where either of them is held up, the rate comes out too low and never too high.
        send = f"import socket, time; peer = socket.create_connection(({hosts.address(target)!r}, 9999)); print(time.monotonic()); "
        send += f"peer.sendall(bytes({PAYLOAD_BYTES}))"
        command = hosts.command(source, [sys.executable, "-W", "ignore", "-c", send])
        sent = subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE, text=True)
        return PAYLOAD_BYTES * 8 / (float(server.stdout.readline()) - float(sent.stdout))


@needs_namespaces
def test_a_link_carries_no_more_than_its_rate_up(hosts: Hosts) -> None:
    # One burst of the bucket goes through at once.
    assert _rate_bits_per_s(hosts, "board", "server") < 2e6 * PAYLOAD_BYTES / (PAYLOAD_BYTES - 2 * 65_536) * 1.1


@needs_namespaces
def test_a_process_that_takes_more_memory_than_its_host_has_is_killed_and_counted(hosts: Hosts) -> None:
    ended = subprocess.run(hosts.command("board", [sys.executable, "-c", f"bytearray({512 * MIB})"]), check=False, timeout=60)
    assert ended.returncode == -9
    assert hosts.group("board").memory_events() == 1


@needs_namespaces
def test_processor_time_is_counted_for_the_host(hosts: Hosts) -> None:
    before = hosts.group("server").cpu_seconds()
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run(hosts.command("server", [sys.executable, "-c", burn]), check=True, timeout=60)
    assert hosts.group("server").cpu_seconds() - before >= 0.3


@needs_namespaces
def test_a_host_whose_cable_is_pulled_reaches_nobody_until_it_is_back(hosts: Hosts) -> None:
    knock = f"import socket; s = socket.socket(); s.settimeout(1); raise SystemExit(s.connect_ex(({hosts.address('server')!r}, 9)) != 111)"

    def reaches() -> bool:
        return subprocess.run(hosts.command("board", [sys.executable, "-c", knock]), check=False, timeout=60).returncode == 0

    assert any(reaches() for _ in range(10))  # the bridge takes a moment, also at its start
    hosts.cut("board")
    assert not reaches()
    hosts.mend("board")
    assert any(reaches() for _ in range(10))


@needs_namespaces
def test_nothing_is_left_of_hosts_not_even_a_process_that_holds_on() -> None:
    prefix = f"ftg{os.getpid()}"
    with Hosts([Host("board", Limits(1.0))], prefix=prefix) as made:
        hold = "trap '' TERM; echo in; while :; do sleep 1; done"
        holder = subprocess.Popen(made.command("board", ["/bin/sh", "-c", hold]), stdout=subprocess.PIPE)
        assert holder.stdout is not None
        with holder.stdout:
            assert holder.stdout.readline() == b"in\n"
    assert holder.wait(60) == -9
    assert not [name for name in os.listdir("/run/netns") if name.startswith(prefix)]
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{prefix}-board"))


@needs_namespaces
def test_what_a_tool_says_is_told() -> None:
    hosts = Hosts([Host("a/b", Limits(1.0))], prefix=f"ftb{os.getpid()}")
    with pytest.raises(MachineError, match="ip netns add"), hosts:
        pass


def test_a_folder_without_controllers_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpu").write_text("")
    with pytest.raises(MachineError, match="root and the cpu and memory controllers"):
        Group("board", Limits(1.0), root=tmp_path).create()


@needs_namespaces
def test_a_link_with_a_latency_takes_its_time_in_both_directions() -> None:
    pair = [Host("server", Limits(1.0)), Host("far", Limits(1.0), Link(8e6, 8e6, latency_ms=50))]
    with Hosts(pair, prefix=f"ftl{os.getpid()}") as hosts:
        server = subprocess.Popen(hosts.command("server", [sys.executable, "-c", _RECEIVE]), stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        with server, server.stdout:
            assert server.stdout.readline() == "ready\n"
            dial = "import socket, sys, time; begun = time.monotonic(); peer = socket.create_connection((sys.argv[1], 9999)); "
            dial += "print(time.monotonic() - begun); peer.sendall(b'xy'); peer.close()"
            took = subprocess.run(
                hosts.command("far", [sys.executable, "-c", dial, hosts.address("server")]), check=True, capture_output=True, text=True
            )
            server.stdout.readline()
        assert float(took.stdout) >= 0.1
        sent, received = hosts.traffic()["far"]
        assert sent > 0 and received > 0
