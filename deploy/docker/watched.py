#!/usr/bin/env python3
"""What systemd does for a daemon, for one in a container: hears its notify messages, and ends it when its pings stay away.

watched.py -- COMMAND ...      runs it with a socket to notify; signals are handed on, its exit code is ours
watched.py --check             exit code 0 if it is ready and pings; prints what it said last
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(os.environ.get("FLEETUNE_WATCH_DIR", "/tmp/fleetune-watch"))
WATCHDOG_S = 60.0
START_S = 900.0
"""A database of an older version is upgraded before a coordinator is ready."""

LOOK_S = 2.0
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        return check()
    if len(arguments) < 2 or arguments[0] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    return watch(arguments[1:])


def check() -> int:
    """What the last message said, by how old it is."""
    try:
        state, _, status = (FOLDER / "last").read_text(encoding="utf-8").partition("\n")
        silent_s = time.time() - (FOLDER / "last").stat().st_mtime
    except FileNotFoundError:
        print("not ready: nothing was heard of it yet")
        return 1
    print(f"{state}: {status}, {max(0.0, silent_s):.0f} s ago")
    return 0 if state == "ready" and silent_s < WATCHDOG_S else 1


def watch(command: list[str]) -> int:
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    for name in ("last", "notify"):  # of a container that is started again
        (FOLDER / name).unlink(missing_ok=True)
    messages = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    messages.bind(str(FOLDER / "notify"))
    messages.settimeout(LOOK_S)
    watched = {"NOTIFY_SOCKET": str(FOLDER / "notify"), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    child = subprocess.Popen(command, env={**os.environ, **watched})
    for number in HANDED_ON:
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    # An empty message: the end of the child ends the wait for one.
    waker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: waker.sendto(b"", str(FOLDER / "notify")))
    state, status, heard_s = "not ready", "starting", time.monotonic()
    while child.poll() is None:
        try:
            text = messages.recv(65_536).decode("utf-8", "replace")
        except TimeoutError:
            text = ""
        words = dict(line.partition("=")[::2] for line in text.splitlines())
        if words:
            heard_s = time.monotonic()
            state = "ready" if "READY" in words else "stopping" if "STOPPING" in words else state
            status = words.get("STATUS", status)
            write(f"{state}\n{status}")
        silent_s = time.monotonic() - heard_s
        if silent_s > (START_S if state == "not ready" else WATCHDOG_S):
            print(f"watched: nothing was heard of it for {silent_s:.0f} s; it is killed", file=sys.stderr, flush=True)
            child.kill()
            break
    code = child.wait()
    return 128 - code if code < 0 else code


def write(text: str) -> None:
    """A full disk must not end what is watched: then the check sees an old message."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=FOLDER, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, FOLDER / "last")
    except OSError as error:
        print(f"watched: {FOLDER} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
