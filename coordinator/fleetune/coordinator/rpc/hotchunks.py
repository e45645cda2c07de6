"""Encoded chunks in memory: the devices of a round fetch the same state, one soon after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

KEPT_S = 30.0
"""After the last download that began with them."""

BLOBS_MAX = 16
"""However small they are: a job of short rounds asks for another blob every few moments and never pauses for `KEPT_S`."""


@dataclass(frozen=True)
class Response:
    """An encoded DownloadResponse, and the position in the blob after it."""

    encoded: bytes
    end: int


class HotChunks:
    """At most `bytes_max` of responses, of `BLOBS_MAX` blobs; the one asked for least lately goes first. Used on one event loop."""

    def __init__(self, bytes_max: int, kept_s: float = KEPT_S) -> None:
        self.held_bytes = 0
        self._bytes_max = bytes_max
        self._kept_s = kept_s
        # Digest -> position -> response; the blob that was asked for last stands last.
        self._blobs: dict[str, dict[int, Response]] = {}
        self._asked_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def of(self, digest: str) -> Mapping[int, Response]:
        """The blob's responses by position, also those that come to it later."""
        self._asked_s = asyncio.get_running_loop().time()
        found = self._blobs.pop(digest, {})
        self._blobs[digest] = found
        if len(self._blobs) > BLOBS_MAX:
            self._drop(next(iter(self._blobs)))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._kept_s, self._look)
        return found

    def put(self, digest: str, position: int, response: Response) -> None:
        """Keep one of a blob that `of` was asked for. Nothing happens where it is kept already, or does not fit beside its own blob's."""
        blob = self._blobs.get(digest)
        if blob is None or position in blob:
            return
        size_bytes = len(response.encoded)
        for other in list(self._blobs):
            if self.held_bytes + size_bytes <= self._bytes_max:
                break
            if other != digest:
                self._drop(other)
        if self.held_bytes + size_bytes <= self._bytes_max:
            blob[position] = response
            self.held_bytes += size_bytes

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _drop(self, digest: str) -> None:
        self.held_bytes -= sum(len(response.encoded) for response in self._blobs.pop(digest).values())

    def _look(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        left_s = self._asked_s + self._kept_s - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._look)
            return
        for digest in list(self._blobs):
            self._drop(digest)
