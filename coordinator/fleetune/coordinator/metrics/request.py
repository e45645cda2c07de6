"""The little of HTTP/1 that a reader of metrics speaks. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

HEAD_BYTES_MAX = 8192
HEADERS_MAX = 100
PATH = "/metrics"

_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (\S{1,2048}) HTTP/1\.[01]", re.ASCII)
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


@dataclass(frozen=True)
class Request:
    """What was asked for, as far as it matters. Header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def accept(self) -> str:
        return self.headers.get("accept", "")

    @property
    def takes_gzip(self) -> bool:
        offers = [offer.strip().partition(";") for offer in self.headers.get("accept-encoding", "").lower().split(",")]
        return any(name.strip() == "gzip" and not re.fullmatch(r"q=0(\.0*)?", rest.strip()) for name, _, rest in offers)

    @property
    def host(self) -> str:
        """Without the port; empty where it is not said."""
        told = self.headers.get("host", "")
        return told.rpartition(":")[0] if re.search(r":\d*$", told) else told

    @property
    def bearer(self) -> str:
        scheme, _, secret = self.headers.get("authorization", "").partition(" ")
        return secret.strip() if scheme.lower() == "bearer" else ""

    @property
    def objection(self) -> HTTPStatus | None:
        """Why it gets no metrics, before anybody looks at who asks."""
        if self.method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED
        if self.path.partition("?")[0] != PATH:
            return HTTPStatus.NOT_FOUND
        return None


def parse(head: bytes) -> Request | None:
    """A request from its first line to the empty one; None for what is none."""
    lines = head.decode("latin-1").split("\r\n")
    first = _REQUEST_LINE.fullmatch(lines[0])
    while lines and not lines[-1]:
        lines.pop()
    if first is None or len(lines) > HEADERS_MAX:
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        found = _HEADER.fullmatch(line)
        if found is None:
            return None
        headers[found[1].lower()] = found[2].strip()
    return Request(first[1], first[2], headers)


def answer_head(status: HTTPStatus, content_type: str, length: int, *, gzipped: bool = False) -> bytes:
    """Status line and headers. One request is answered on a connection."""
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {length}",
        "Connection: close",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
    ]
    if gzipped:
        lines.append("Content-Encoding: gzip")
    if status is HTTPStatus.UNAUTHORIZED:
        lines.append('WWW-Authenticate: Bearer realm="metrics"')
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
