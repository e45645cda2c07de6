"""What a daemon tells the supervisor that started it: systemd's notify protocol, one datagram a message, silent without one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, MutableMapping

LOG = logging.getLogger(__name__)

PINGS_A_PERIOD = 3
"""A ping may come late twice before the supervisor gives up on the loop."""

STATUS_S = 5.0
"""How often the status line is looked at; systemd shows it in `systemctl status`."""

STATUS_CHARACTERS_MAX = 200


class Supervisor:
    """`watchdog_s` 0: nobody waits for pings. `address` empty: there is no supervisor, and every call does nothing."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        self._status = ""
        self._complained = False

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str], pid: int | None = None) -> Supervisor:
        """The one that this process was started by. Its variables are taken away: children have no business with it."""
        address = environment.pop("NOTIFY_SOCKET", "")
        period_us = environment.pop("WATCHDOG_USEC", "")
        for_pid = environment.pop("WATCHDOG_PID", "")
        if not address.startswith(("/", "@")):
            return cls()
        # A wrapper that was watched itself may have left its own behind.
        ours = for_pid in ("", str(os.getpid() if pid is None else pid))
        return cls(address, int(period_us) / 1e6 if ours and period_us.isascii() and period_us.isdecimal() else 0.0)

    def ready(self, status: str) -> None:
        """Started: what waits for this unit may begin."""
        self._status = _line(status)
        self._send(f"READY=1\nSTATUS={self._status}")

    def stopping(self, status: str) -> None:
        self._status = _line(status)
        self._send(f"STOPPING=1\nSTATUS={self._status}")

    async def watch(self, status: Callable[[], str]) -> None:
        """Ping, and tell the status where it has changed, until cancelled.

        Pings come from the event loop and from nowhere else: a loop that is stuck does not ping, and is ended by the supervisor.
        """
        if not self._address:
            await asyncio.Event().wait()
        pause_s = min(STATUS_S, self.watchdog_s / PINGS_A_PERIOD) if self.watchdog_s else STATUS_S
        while True:
            text = _line(status())
            words = ["WATCHDOG=1"] if self.watchdog_s else []
            if text != self._status:
                self._status = text
                words.append(f"STATUS={text}")
            if words:
                self._send("\n".join(words))
            await asyncio.sleep(pause_s)

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                # A supervisor that does not read must not stop what it supervises.
                sender.setblocking(False)
                sender.sendto(message.encode("utf-8", "replace"), self._address)
        except OSError as error:
            if not self._complained:
                self._complained = True
                LOG.warning("the supervisor cannot be told socket=%r cause=%r", self._address, str(error))


def _line(text: str) -> str:
    """One line: a line break would begin another assignment."""
    return " ".join(text.split())[:STATUS_CHARACTERS_MAX]
