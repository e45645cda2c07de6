"""A reader of metrics that speaks HTTP by hand, so that it can also speak it badly."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

ANSWER_S = 60.0
"""Longest wait for anything a test expects; only a bug takes longer."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return (gzip.decompress(self.body) if self.headers.get("content-encoding") == "gzip" else self.body).decode()


async def ask(port: int, path: str = "/metrics", *, method: str = "GET", tls: ssl.SSLContext | None = None, **headers: str) -> Answer:
    """What an HTTP reader gets; header names are written with _ for -."""
    lines = [
        f"{method} {path} HTTP/1.1",
        *([] if "Host" in headers else ["Host: 127.0.0.1:9464"]),
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return parsed(await raw(port, ("\r\n".join(lines) + "\r\n\r\n").encode(), tls=tls))


async def raw(port: int, request: bytes, *, tls: ssl.SSLContext | None = None) -> bytes:
    """All that comes back for these bytes until the other end hangs up; nothing where it resets."""

    async def exchange() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        try:
            writer.write(request)
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.transport.abort()

    return await asyncio.wait_for(exchange(), ANSWER_S)


def parsed(answer: bytes) -> Answer:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


@dataclass(frozen=True)
class Scrape:
    """The metrics as the library's own parser reads them."""

    families: dict[str, Metric]

    def value(self, name: str, **labels: str) -> float:
        """Of the one sample of this name and these labels."""
        found = [s.value for family in self.families.values() for s in family.samples if s.name == name and s.labels == labels]
        assert len(found) == 1, f"{name}{labels}: {found}"
        return found[0]

    def has(self, name: str, **labels: str) -> bool:
        return any(s.name == name and s.labels == labels for family in self.families.values() for s in family.samples)

    def labels(self, name: str, label: str) -> set[str]:
        """Values of a label over the samples of this name."""
        return {s.labels[label] for family in self.families.values() for s in family.samples if s.name == name}


async def scrape(port: int, *, tls: ssl.SSLContext | None = None, **headers: str) -> Scrape:
    answer = await ask(port, tls=tls, **headers)
    assert answer.status == 200, answer
    return Scrape({family.name: family for family in text_string_to_metric_families(answer.text)})
