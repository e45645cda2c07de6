"""A bad link between two namespaces: frames take their time, some longer than others, some get lost and some come twice.

Run by its path in place of the testbed's `delay.py`, with the same arguments; CABLE in the environment adds "JITTER_S LOSS DUPLICATED",
the last two as shares of the frames. It is the kernel's netem where there is none.
"""

from __future__ import annotations

import heapq
import importlib.util
import os
import random
import select
import sys
import time
from pathlib import Path

_DELAY = Path(__file__).resolve().parents[1] / "coordinator" / "fleetune" / "coordinator" / "testbed" / "delay.py"


def main() -> int:
    spec = importlib.util.spec_from_file_location("delay", _DELAY)
    assert spec is not None and spec.loader is not None
    delay = importlib.util.module_from_spec(spec)
    sys.modules["delay"] = delay
    spec.loader.exec_module(delay)
    first_namespace, first, second_namespace, second, delay_s = sys.argv[1:]
    jitter_s, loss, duplicated = map(float, os.environ.get("CABLE", "0 0 0").split())
    ends = delay._tap(first_namespace, first), delay._tap(second_namespace, second)
    carry(*ends, float(delay_s), jitter_s, loss, duplicated)
    return 0


def carry(first: int, second: int, delay_s: float, jitter_s: float, loss: float, duplicated: float) -> None:
    """For ever. A frame that drew a longer way comes after those that drew a shorter one."""
    print("ready", flush=True)
    rng = random.Random(1)
    other = {first: second, second: first}
    queue: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait_s = max(0.0, queue[0][0] - time.monotonic()) if queue else None
        readable, _, _ = select.select([first, second], [], [], wait_s)
        now_s = time.monotonic()
        for source in readable:
            for _ in range(64):
                try:
                    frame = os.read(source, 65_536)
                except BlockingIOError:
                    break
                if rng.random() < loss:
                    continue
                for _ in range(2 if rng.random() < duplicated else 1):
                    number += 1
                    heapq.heappush(queue, (now_s + delay_s + rng.random() * jitter_s, number, other[source], frame))
        now_s = time.monotonic()
        while queue and queue[0][0] <= now_s:
            _, _, target, frame = heapq.heappop(queue)
            try:
                os.write(target, frame)
            except OSError:  # the device is down, or its queue is full: a frame is lost, as on any link
                continue


if __name__ == "__main__":
    sys.exit(main())
