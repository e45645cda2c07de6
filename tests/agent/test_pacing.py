"""Uploads keep to their rate, also while the rate changes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.agent.pacing import BURST_PIECES, PIECE_BYTES_MAX, PIECE_BYTES_MIN, RATE_MIN_BITS_PER_S, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def send(bucket: TokenBucket, clock: Clock, total_bytes: int) -> list[tuple[float, int]]:
    """Sends pieces as soon as each may go; when each went, and how large it was."""
    sent: list[tuple[float, int]] = []
    while total_bytes > 0:
        size = min(bucket.piece_bytes, total_bytes)
        clock.now_s += bucket.wait_s(size)
        bucket.take(size)
        sent.append((clock.now_s, size))
        total_bytes -= size
    return sent


@pytest.mark.parametrize("bits_per_s", [50e3, 1e6, 8e6, 1e9])
@pytest.mark.parametrize("size_bytes", [1000, 50_000, 3_000_001])
def test_bytes_are_through_after_size_by_rate(bits_per_s: float, size_bytes: int) -> None:
    clock = Clock()
    bucket = TokenBucket(bits_per_s, clock)
    assert send(bucket, clock, size_bytes)[-1][0] - 100.0 == pytest.approx(8 * size_bytes / bits_per_s, rel=1e-6)


def test_without_a_rate_nothing_waits() -> None:
    bucket = TokenBucket(0.0, Clock())
    bucket.take(1 << 30)
    assert bucket.wait_s(1 << 30) == 0.0


def test_a_pause_saves_up_no_more_than_two_pieces() -> None:
    clock = Clock()
    bucket = TokenBucket(8e6, clock)
    clock.now_s += 3600
    at_once = [at for at, _ in send(bucket, clock, 10 * bucket.piece_bytes) if at == 3700.0]
    assert len(at_once) == BURST_PIECES


def test_an_upload_begins_with_nothing_saved_up() -> None:
    clock = Clock()
    bucket = TokenBucket(8e6, clock)
    clock.now_s += 3600
    bucket.empty()
    assert bucket.wait_s(50_000) == pytest.approx(0.05)


def test_a_new_rate_counts_from_now_on() -> None:
    clock = Clock()
    bucket = TokenBucket(8e6, clock)
    # A megabyte a second for half a second, then a tenth of that for what is left.
    assert bucket.wait_s(50_000) == pytest.approx(0.05)
    clock.now_s += 0.025
    bucket.set_rate(0.8e6)
    assert bucket.wait_s(5_000) == 0.0
    bucket.set_rate(0.0)
    assert bucket.wait_s(1 << 30) == 0.0


def test_a_chunk_larger_than_the_burst_goes_once_the_bucket_is_full_and_is_paid_for_afterwards() -> None:
    clock = Clock()
    bucket = TokenBucket(8e6, clock)
    full_s = bucket.wait_s(1 << 20)
    assert full_s == pytest.approx(BURST_PIECES * bucket.piece_bytes / 1e6)
    clock.now_s += full_s
    bucket.take(1 << 20)
    clock.now_s += bucket.wait_s(1)
    assert clock.now_s - 100.0 == pytest.approx((1 << 20) / 1e6, rel=1e-5)


@pytest.mark.parametrize("wish", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_what_is_no_rate_is_no_bound(wish: float) -> None:
    assert TokenBucket(wish).bytes_per_s == 0.0


def test_an_absurdly_small_rate_is_raised() -> None:
    assert TokenBucket(1e-9).bytes_per_s == RATE_MIN_BITS_PER_S / 8


@given(st.floats(1e3, 1e10))
def test_pieces_stay_within_their_bounds(bits_per_s: float) -> None:
    assert PIECE_BYTES_MIN <= TokenBucket(bits_per_s).piece_bytes <= PIECE_BYTES_MAX


@given(st.lists(st.tuples(st.floats(1e4, 1e8), st.floats(0, 2), st.integers(1, 200_000)), min_size=1, max_size=30))
def test_whatever_happens_no_more_goes_than_the_rates_and_one_burst_allow(steps: list[tuple[float, float, int]]) -> None:
    clock = Clock()
    bucket = TokenBucket(steps[0][0], clock)
    allowed = sent = 0.0
    for rate, pause_s, size in steps:
        bucket.set_rate(rate)
        piece = min(size, bucket.piece_bytes)
        wait_s = bucket.wait_s(piece) + pause_s
        clock.now_s += wait_s
        allowed += wait_s * rate / 8
        bucket.take(piece)
        sent += piece
        assert sent <= allowed + BURST_PIECES * PIECE_BYTES_MAX + 1e-3


def test_pieces_go_evenly() -> None:
    clock = Clock()
    bucket = TokenBucket(1e6, clock)
    gaps = {
        round(late - early, 6)
        for (early, _), (late, size) in itertools.pairwise(send(bucket, clock, 500_000))
        if size == bucket.piece_bytes
    }
    assert gaps == {0.05}
