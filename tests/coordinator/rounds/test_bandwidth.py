"""Uploads of a planned round keep to what they share, and with weights leave nothing of it unused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.rounds.bandwidth import RAISE_FROM, Claim, Sharing, UplinkShares, rates

MBIT = 1e6
SHARINGS = st.sampled_from(["weights", "hard"])


@st.composite
def fleets(draw: st.DrawFn) -> tuple[float, dict[str, Claim]]:
    """A resource and claims whose shares take all of it or less."""
    total = draw(st.sampled_from([1.0, 8e6, 1e9]))
    parts = draw(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12))
    used = draw(st.floats(0.5, 1.0)) * total / math.fsum(parts)
    claims: dict[str, Claim] = {}
    for index, part in enumerate(parts):
        unit = 1.0 if total > 1.0 else draw(st.floats(1e5, 1e8))
        own = draw(st.sampled_from([math.inf, part * used * unit * draw(st.floats(0.3, 4.0))]))
        claims[f"d{index}"] = Claim(part * used, unit, own)
    return total, claims


def units(found: dict[str, float], claims: dict[str, Claim]) -> float:
    return math.fsum(rate / claims[device].bits_per_unit for device, rate in found.items())


def began(shares: UplinkShares, device: str, claim: Claim) -> dict[str, float]:
    shares.began(device, claim)
    return shares.changes()


def ended(shares: UplinkShares, device: str) -> dict[str, float]:
    shares.ended(device)
    return shares.changes()


@given(fleets(), SHARINGS)
def test_together_they_never_take_more_than_there_is(fleet: tuple[float, dict[str, Claim]], sharing: Sharing) -> None:
    total, claims = fleet
    found = rates(claims, total, sharing)
    assert found.keys() == claims.keys()
    assert units(found, claims) <= total * (1 + 1e-12)
    assert all(0 < rate <= claims[device].own_bits_per_s for device, rate in found.items())


@given(fleets())
def test_weights_make_nobody_slower_than_its_share_and_leave_nothing_that_somebody_can_use(fleet: tuple[float, dict[str, Claim]]) -> None:
    total, claims = fleet
    shared, hard = rates(claims, total, "weights"), rates(claims, total, "hard")
    assert all(shared[device] >= hard[device] * (1 - 1e-12) for device in claims)
    bound = [device for device, rate in shared.items() if rate >= claims[device].own_bits_per_s * (1 - 1e-9)]
    assert units(shared, claims) == pytest.approx(total) or len(bound) == len(claims)
    free = [shared[device] / claims[device].bits_per_unit / claims[device].share for device in claims if device not in bound]
    assert not free or max(free) == pytest.approx(min(free))


@given(fleets(), SHARINGS, st.data())
def test_what_they_were_told_keeps_to_it_while_they_come_and_go(
    fleet: tuple[float, dict[str, Claim]], sharing: Sharing, data: st.DataObject
) -> None:
    total, claims = fleet
    shares = UplinkShares(total, sharing)
    for device in data.draw(st.lists(st.sampled_from(sorted(claims)), max_size=30)):
        if device in shares.sending:
            ended(shares, device)
        else:
            assert device in began(shares, device, claims[device])
        told = dict(shares.told)
        assert told.keys() == set(shares.sending)
        assert units(told, claims) <= total * (1 + 1e-12)
        wanted = rates({name: claims[name] for name in told}, total, sharing)
        assert all(wanted[name] <= told[name] * RAISE_FROM for name in told)
        assert all(told[name] <= wanted[name] for name in told)


def test_who_is_alone_has_all_of_it_and_gives_way_to_who_comes() -> None:
    shares = UplinkShares(8 * MBIT, "weights")
    slow, fast = Claim(2 * MBIT, 1.0), Claim(6 * MBIT, 1.0)
    assert began(shares, "slow", slow) == {"slow": 8 * MBIT}
    assert list(began(shares, "fast", fast).items()) == [("slow", 2 * MBIT), ("fast", 6 * MBIT)]
    assert ended(shares, "fast") == {"slow": 8 * MBIT}
    assert ended(shares, "slow") == {}


def test_airtime_is_shared_in_time_and_not_in_bits() -> None:
    near, far = Claim(0.25, 40 * MBIT), Claim(0.75, 4 * MBIT)
    shares = UplinkShares(1.0, "weights")
    assert began(shares, "near", near) == {"near": 40 * MBIT}
    assert began(shares, "far", far) == {"near": 10 * MBIT, "far": 3 * MBIT}


def test_what_a_slow_link_cannot_use_is_for_the_others() -> None:
    claims = {"slow": Claim(4 * MBIT, 1.0, 1 * MBIT), "a": Claim(2 * MBIT, 1.0), "b": Claim(2 * MBIT, 1.0, 3 * MBIT)}
    assert rates(claims, 8 * MBIT, "weights") == {"slow": 1 * MBIT, "b": 3 * MBIT, "a": 4 * MBIT}


def test_hard_shares_stay_whoever_sends() -> None:
    shares = UplinkShares(8 * MBIT, "hard")
    one, two = Claim(2 * MBIT, 1.0), Claim(6 * MBIT, 1.0)
    assert began(shares, "one", one) == {"one": 2 * MBIT}
    assert began(shares, "two", two) == {"two": 6 * MBIT}
    assert ended(shares, "two") == {}


def test_a_device_that_dies_and_comes_back_is_told_again() -> None:
    shares = UplinkShares(8 * MBIT, "weights")
    one, two = Claim(4 * MBIT, 1.0), Claim(4 * MBIT, 1.0)
    began(shares, "one", one)
    began(shares, "two", two)
    assert ended(shares, "two") == {"one": 8 * MBIT}
    assert began(shares, "two", two) == {"one": 4 * MBIT, "two": 4 * MBIT}


def test_small_gains_are_not_told() -> None:
    shares = UplinkShares(100.0, "weights")
    for index in range(100):
        began(shares, f"d{index}", Claim(1.0, 1.0))
    assert ended(shares, "d0") == {}
    assert all(ended(shares, f"d{index}") == {} for index in range(1, 4))
    assert len(ended(shares, "d4")) == 95
