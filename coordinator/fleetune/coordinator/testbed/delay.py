"""A link that takes its time: frames between two namespaces are held for a while each, where the kernel has no netem."""

# Run by its path with `python -I -S`, one for each host with a latency. Two TAP devices instead of a veth pair: what goes into one comes
# out of the other after the delay. Rates stay the kernel's, by the token buckets on both devices. Python carries some 100 Mbit/s of
# full-size frames on a shared core, outside of the host's quota; above that it is the bottleneck, and frames are dropped where its
# queue is full.

from __future__ import annotations

import collections
import ctypes
import fcntl
import os
import select
import struct
import sys
import time

CLONE_NEWNET = 0x4000_0000
TUNSETIFF = 0x4004_54CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME_BYTES_MAX = 65_536
BATCH_FRAMES = 64
QUEUE_BYTES_MAX = 16 << 20
"""A second of 100 Mbit/s."""


def main() -> int:
    """argv: namespace and device, namespace and device, delay in seconds. Says "ready" when both devices are there."""
    first_namespace, first, second_namespace, second, delay = sys.argv[1:]
    carry(_tap(first_namespace, first), _tap(second_namespace, second), float(delay))
    return 0


def _tap(namespace: str, device: str) -> int:
    """A descriptor that is the cable of a new device in another namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TAP | IFF_NO_PI))
        libc.setns(home, CLONE_NEWNET)
    finally:
        os.close(there)
        os.close(home)
    return descriptor


def carry(first: int, second: int, delay_s: float) -> None:
    """For ever: what can be read from one is written to the other, `delay_s` later."""
    print("ready", flush=True)
    # One queue for each way: its frames leave in the order in which they came.
    queues = {first: collections.deque[tuple[float, bytes]](), second: collections.deque[tuple[float, bytes]]()}
    other = {first: second, second: first}
    held = {first: 0, second: 0}
    while True:
        now_s = time.monotonic()
        due = [queue[0][0] for queue in queues.values() if queue]
        readable, _, _ = select.select([first, second], [], [], max(0.0, min(due) - now_s) if due else None)
        now_s = time.monotonic()
        for source in readable:
            for _ in range(BATCH_FRAMES):
                try:
                    frame = os.read(source, FRAME_BYTES_MAX)
                except BlockingIOError:
                    break
                if held[source] + len(frame) <= QUEUE_BYTES_MAX:
                    queues[source].append((now_s + delay_s, frame))
                    held[source] += len(frame)
        now_s = time.monotonic()
        for source, queue in queues.items():
            while queue and queue[0][0] <= now_s:
                frame = queue.popleft()[1]
                held[source] -= len(frame)
                try:
                    os.write(other[source], frame)
                except OSError:  # the device is down, or its queue is full: a frame is lost, as on any link
                    continue


if __name__ == "__main__":
    sys.exit(main())
