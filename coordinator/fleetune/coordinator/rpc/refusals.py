"""Who was refused what: told to the log at once and then once a minute with a count, in bounded memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("fleetune.gate")

KINDS_KEPT = 1024
"""Kinds of refusals that are told apart; the others are counted together."""

TELL_S = 60.0
"""A refusal of the same caller, method and reason is told once in so long, with the number of the others."""


@dataclass(frozen=True)
class Kind:
    """What is told together: a caller (an address without its port), a method and a reason."""

    who: str
    method: str
    why: str


OTHERS = Kind("others", "any", "more kinds of refusals than are told apart")


class Refusals:
    """The throttle of one server. Used on the event loop alone."""

    def __init__(self, monotonic: Callable[[], float], on_more: Callable[[Kind, int], None] | None = None) -> None:
        """`on_more` hears, beside the log, how many there were of a kind since it was told last."""
        self._monotonic = monotonic
        self._on_more = on_more
        self.count = 0
        """Of all kinds."""
        self._told: dict[Kind, _Told] = {}
        self._timer: asyncio.TimerHandle | None = None

    def note(self, who: str, method: str, why: str, detail: str = "") -> bool:
        """Count one; True where it was told at once. `detail` is for the log in place of `why`: what may differ each time."""
        self.count += 1
        kind = Kind(_host(who), method, why)
        told = self._told.get(kind)
        if told is None and len(self._told) >= KINDS_KEPT:
            kind, detail = OTHERS, ""
            told = self._told.get(kind)
        if told is not None:
            told.more += 1
            return False
        log.warning("refused caller=%r method=%s reason=%r", kind.who, kind.method, detail or kind.why)
        self._told[kind] = _Told(self._monotonic())
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TELL_S, self._sum_up)
        return True

    def _sum_up(self) -> None:
        self._timer = None
        now = self._monotonic()
        for kind, told in list(self._told.items()):
            since_s = now - told.since_s
            if since_s < TELL_S * 0.99:
                continue
            if told.more:
                log.warning(
                    "refused caller=%r method=%s reason=%r another %d times in %.0f s", kind.who, kind.method, kind.why, told.more, since_s
                )
                if self._on_more is not None:
                    self._on_more(kind, told.more)
                told.more, told.since_s = 0, now
            else:
                del self._told[kind]
        if self._told:
            self._timer = asyncio.get_running_loop().call_later(TELL_S, self._sum_up)


@dataclass
class _Told:
    since_s: float
    more: int = 0


def _host(who: str) -> str:
    """An address without its port, which differs with every connection."""
    return who.rpartition(":")[0] if who.startswith(("ipv4:", "ipv6:")) else who
