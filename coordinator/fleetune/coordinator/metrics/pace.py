"""Long work of a thread in small bites, so that the event loop gets the interpreter when it wants it.

Left alone, a thread that computes gives it up every 5 ms when asked; each message that arrives meanwhile would wait for so long.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

BITE = 64
PAUSE_S = 0.0001

T = TypeVar("T")


def paced(items: Iterable[T]) -> Iterator[T]:
    """The same items, with a breath after every few."""
    for number, item in enumerate(items, 1):
        yield item
        if number % BITE == 0:
            time.sleep(PAUSE_S)


class Paced(list[T]):
    """A list whose reader takes a breath now and then."""

    def __iter__(self) -> Iterator[T]:
        return paced(super().__iter__())
