"""What the testbed's links carry: TCP goodput through namespaces and control groups, for every kind of device, against what is configured.

    sudo .venv/bin/python bench/testbed_links.py [--seconds 4] [--json FILE] [--latency-ms 20]

Goodput counts payload alone; TCP, IP and Ethernet headers take 5 % of a frame of 1500 bytes. Done at once with the upload that the first
segment of is in: connecting and the slow start's first round trip are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fleetune.coordinator.testbed.hosts import Host, Hosts, Link
from fleetune.coordinator.testbed.limits import Limits
from fleetune.coordinator.testbed.spec import KINDS, MBIT

PORT = 9999
LIMIT_S = 120.0

_RECEIVE = """
import socket, sys, time
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("0.0.0.0", int(sys.argv[1])))
server.listen()
print("ready", flush=True)
peer, _ = server.accept()
buffer = bytearray(1 << 18)
first = peer.recv_into(buffer)
begun, size = time.monotonic(), 0
while count := peer.recv_into(buffer):
    size += count
print(size * 8 / (time.monotonic() - begun))
"""

_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as peer:
    left, block = int(sys.argv[3]), bytes(1 << 16)
    while left > 0:
        left -= peer.send(block[: min(left, len(block))])
"""


@dataclass(frozen=True)
class Measured:
    """One direction of one kind's link."""

    kind: str
    direction: str
    configured_mbit: float
    goodput_mbit: float

    @property
    def ratio(self) -> float:
        return self.goodput_mbit / self.configured_mbit


def main() -> int:
    """1 where a link of up to 100 Mbit/s is off by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each transfer at the configured rate")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of every link, in each direction")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    boards = [
        Host(name, Limits(KINDS[name].cpus), Link(KINDS[name].up_mbit * MBIT, KINDS[name].down_mbit * MBIT, options.latency_ms))
        for name in options.kinds
    ]
    found: list[Measured] = []
    print(f"{'kind':<12}{'way':<6}{'configured':>12}{'goodput':>10}{'ratio':>8}")
    with Hosts([Host("server", Limits(2.0)), *boards]) as hosts:
        for name in options.kinds:
            for direction, source, target in (("up", name, "server"), ("down", "server", name)):
                rate = KINDS[name].up_mbit if direction == "up" else KINDS[name].down_mbit
                one = Measured(name, direction, rate, goodput(hosts, source, target, rate * MBIT * options.seconds / 8) / MBIT)
                print(f"{name:<12}{direction:<6}{rate:>7g} Mb/s{one.goodput_mbit:>10.1f}{one.ratio:>8.3f}", flush=True)
                found.append(one)
    if options.json is not None:
        options.json.write_text(json.dumps([{**asdict(one), "ratio": one.ratio} for one in found], indent=2) + "\n", encoding="utf-8")
    return int(any(abs(1 - one.ratio) > 0.1 for one in found if one.configured_mbit <= 100))


def goodput(hosts: Hosts, source: str, target: str, size_bytes: float) -> float:
    """Bit/s of payload."""
    python = [sys.executable, "-I", "-S", "-c"]
    receiver = subprocess.Popen(hosts.command(target, [*python, _RECEIVE, str(PORT)]), stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    with receiver:
        assert receiver.stdout.readline() == "ready\n"
        send = hosts.command(source, [*python, _SEND, hosts.address(target), str(PORT), str(int(size_bytes))])
        subprocess.run(send, check=True, timeout=LIMIT_S)
        return float(receiver.stdout.readline())


if __name__ == "__main__":
    sys.exit(main())
