"""Bytes, durations and measures as a person reads them."""

from __future__ import annotations

import math

import pytest

from fleetune.coordinator import figures


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (10 * 1024, "10 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 40, "3.0 TiB"),
        (1 << 60, "1048576 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert figures.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0421, "42 ms"),
        (0.9996, "1.0 s"),
        (7.34, "7.3 s"),
        (59.4, "59 s"),
        (59.6, "1m 00s"),
        (134, "2m 14s"),
        (7500, "2h 05m"),
        (200000, "2d 07h"),
        (-1, "-"),
        (math.inf, "-"),
        (math.nan, "-"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert figures.duration_text(seconds) == text


def test_losses_and_metrics() -> None:
    assert figures.loss_text(None) == "-"
    assert figures.loss_text(0.52134) == "0.5213"
    assert figures.loss_text(12345.678) == "1.235e+04"
    assert figures.loss_text(math.nan) == "nan"
    assert figures.metric_text("accuracy", 0.9131) == "91.3%"
    assert figures.metric_text("perplexity", 3.25) == "3.2500"
    assert figures.count_text(1, "device") == "1 device"
    assert figures.count_text(1300, "row") == "1,300 rows"
