"""Lists of jobs in pages: from the newest to the oldest, each page as long as an answer holds. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

PAGE_MAX = 1000
"""Jobs in one answer, also where fewer are not asked for."""

TOKEN_CHARACTERS_MAX = 200


class Submitted(Protocol):
    """What places a job among the others."""

    @property
    def job_id(self) -> str: ...

    @property
    def submitted_unix_s(self) -> float: ...


class Sized(Protocol):
    """A message."""

    def ByteSize(self) -> int: ...


J = TypeVar("J", bound=Submitted)
V = TypeVar("V", bound=Sized)


class TokenError(ValueError):
    """A token that no page has given."""


def page(
    jobs: Iterable[J], size: int, token: str, view: Callable[[J], V], *, bytes_max: int, size_max: int = PAGE_MAX
) -> tuple[Sequence[V], str]:
    """The views of one page, its oldest job first, and the token of the page before it in time; an empty one after the oldest job.

    `size` 0: as many as an answer holds. An empty `token`: the newest jobs. A job that comes or goes between two pages shifts nothing: the
    next page begins at the job before the last one that was told. TokenError.
    """
    older = sorted(jobs, key=_place, reverse=True)
    if token:
        before = _read(token)
        older = [job for job in older if _place(job) < before]
    most = min(size, size_max) if size else size_max
    found: list[V] = []
    room = bytes_max
    last: J | None = None
    for job in older[:most]:
        made = view(job)
        room -= made.ByteSize() + 8
        # One is always told, or the next page would never come.
        if room < 0 and found:
            break
        found.append(made)
        last = job
    more = last is not None and len(found) < len(older)
    return found[::-1], _token(last) if more and last is not None else ""


def _place(job: Submitted) -> tuple[float, str]:
    return job.submitted_unix_s, job.job_id


def _token(job: Submitted) -> str:
    return base64.urlsafe_b64encode(f"{job.submitted_unix_s!r} {job.job_id}".encode()).decode("ascii")


def _read(token: str) -> tuple[float, str]:
    if len(token) > TOKEN_CHARACTERS_MAX:
        raise TokenError("the page token is longer than any")
    try:
        text = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("utf-8")
        number, space, job_id = text.partition(" ")
        found = float(number), job_id
    except (ValueError, binascii.Error) as error:
        raise TokenError("the page token is none of this coordinator's") from error
    if not space:
        raise TokenError("the page token is none of this coordinator's")
    return found
