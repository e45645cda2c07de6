"""Starts a program, starts it again when it ends badly, as systemd would, and ends it when told to."""

# Run by its path with `python -I -S`: the standard library alone, and no second of start-up. It stays outside of the member's quotas.

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time

PAUSE_S = 1.0
PAUSE_MAX_S = 10.0
GOOD_S = 30.0
"""Who has run for so long is started again at once the next time."""

HOPELESS = (0, 2)
"""Ended as told, or by its settings: another start would end alike."""


def main() -> int:
    """argv: the program and its arguments."""
    child: subprocess.Popen[bytes] | None = None
    told = threading.Event()

    def stop(_number: int, _frame: object) -> None:
        told.set()
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pause_s = PAUSE_S
    while True:
        begun_s = time.monotonic()
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
        if told.is_set():  # between the look and the start
            child.terminate()
        code = child.wait()
        if told.is_set() or code in HOPELESS:
            return code
        if time.monotonic() - begun_s > GOOD_S:
            pause_s = PAUSE_S
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        print(f"testbed: ended {how}; started again in {pause_s:g} s", flush=True)
        if told.wait(pause_s):
            return 0
        pause_s = min(PAUSE_MAX_S, pause_s * 2)


if __name__ == "__main__":
    sys.exit(main())
