"""The little of HTTP that readers of metrics speak, and what is none."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.metrics import request as requests
from fleetune.coordinator.metrics.request import Request

PROMETHEUS = (
    b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9464\r\nUser-Agent: Prometheus/2.42.0\r\n"
    b"Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n"
    b"Accept-Encoding: gzip\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n"
)


def parsed(text: bytes) -> Request:
    found = requests.parse(text)
    assert found is not None
    return found


def test_prometheus_is_understood() -> None:
    found = parsed(PROMETHEUS)
    assert (found.method, found.path, found.objection) == ("GET", "/metrics", None)
    assert found.takes_gzip
    assert "openmetrics" in found.accept


@pytest.mark.parametrize(
    "text",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/1.1 more\r\n\r\n",
        b"get /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nA: 1\r\n folded\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nA: \x00\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"A: 1\r\n" * (requests.HEADERS_MAX + 1) + b"\r\n",
    ],
)
def test_what_is_no_request_is_none(text: bytes) -> None:
    assert requests.parse(text) is None


@given(st.binary(max_size=300))
def test_no_bytes_can_raise(text: bytes) -> None:
    found = requests.parse(text)
    if found is not None:
        assert isinstance((found.objection, found.takes_gzip, found.bearer, found.accept), tuple)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /metrics?collect=all", None),
        (b"HEAD /metrics", None),
        (b"POST /metrics", HTTPStatus.METHOD_NOT_ALLOWED),
        (b"GET /", HTTPStatus.NOT_FOUND),
        (b"GET /metrics/../../etc/passwd", HTTPStatus.NOT_FOUND),
    ],
)
def test_one_path_can_be_read_and_nothing_else(line: bytes, status: HTTPStatus | None) -> None:
    assert parsed(line + b" HTTP/1.1\r\n\r\n").objection is status


@pytest.mark.parametrize(
    ("offer", "takes"),
    [
        ("gzip", True),
        ("deflate, gzip;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip;q=0.00", False),
        ("br", False),
        ("", False),
        ("GZIP", True),
    ],
)
def test_the_text_is_compressed_for_who_offers_it(offer: str, takes: bool) -> None:
    assert parsed(f"GET /metrics HTTP/1.1\r\nAccept-Encoding: {offer}\r\n\r\n".encode()).takes_gzip is takes


@pytest.mark.parametrize(("value", "secret"), [("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("Basic abc", ""), ("Bearer", ""), ("", "")])
def test_a_bearer_secret_is_read(value: str, secret: str) -> None:
    assert parsed(f"GET /metrics HTTP/1.1\r\nAuthorization: {value}\r\n\r\n".encode()).bearer == secret
