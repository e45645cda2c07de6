"""Which token lets whom in, and how often somebody may try."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fleetune.coordinator import tokens
from fleetune.coordinator.principal import Role
from fleetune.coordinator.tokens import Denied, Granted, Holder, Limiter, Token, Wish

NOW = 1000.0
PI = Wish("pi", "device-0001")
TOKEN = Token(tokens.digest("s" * 32), "agent", Role.NONE, "", False, 5, 5, 0.0, 2000.0, "ada")
HOLDER = Holder("f1", "pi", "device-0001", "another", used=True, revoked=False)


def decide(token: Token | None, same_name: list[Holder] | None = None, same_device: list[Holder] | None = None, known: str = "") -> object:
    return tokens.decide(token, PI, same_name or [], same_device or [], known, NOW)


@pytest.mark.parametrize(
    "token",
    [None, replace(TOKEN, uses_left=0), replace(TOKEN, expires_unix_s=NOW), replace(TOKEN, revoked_unix_s=1.0)],
    ids=["unknown", "used up", "expired", "revoked"],
)
def test_whatever_is_wrong_with_a_token_is_told_in_the_same_words(token: Token | None) -> None:
    assert decide(token) == tokens.UNGOOD


def test_a_new_name_costs_one_use_and_ends_nothing() -> None:
    assert decide(TOKEN) == Granted(True, ())


def test_a_token_for_one_name_is_good_for_that_name_alone() -> None:
    assert decide(replace(TOKEN, name="pi")) == Granted(True, ())
    refused = decide(replace(TOKEN, name="kitchen"))
    assert isinstance(refused, Denied)
    assert refused.kind == "name"
    assert "kitchen" not in refused.message


@pytest.mark.parametrize(("kind", "device_id"), [("operator", "device-0001"), ("agent", "")])
def test_a_token_is_for_devices_or_for_operators(kind: tokens.Kind, device_id: str) -> None:
    refused = tokens.decide(replace(TOKEN, kind=kind), Wish("pi", device_id), [], [], "", NOW)
    assert isinstance(refused, Denied)
    assert refused.kind == "invalid"


@pytest.mark.parametrize("holder", [HOLDER, replace(HOLDER, revoked=True)], ids=["good", "revoked"])
def test_a_name_stays_taken_also_after_it_was_revoked(holder: Holder) -> None:
    refused = decide(TOKEN, [holder])
    assert isinstance(refused, Denied)
    assert refused.kind == "exists"


def test_a_name_that_another_device_has_without_a_certificate_is_taken() -> None:
    assert isinstance(decide(TOKEN, known="device-0002"), Denied)
    # The same device, from the days without TLS.
    assert decide(TOKEN, known="device-0001") == Granted(True, ())


def test_replacing_ends_every_good_certificate_of_the_name() -> None:
    ended = replace(HOLDER, fingerprint="f0", revoked=True)
    assert decide(replace(TOKEN, replace=True), [ended, HOLDER], known="device-0002") == Granted(True, ("f1",))


def test_a_device_has_one_name_until_that_is_revoked() -> None:
    other = replace(HOLDER, name="kitchen")
    for token in (TOKEN, replace(TOKEN, replace=True)):
        refused = decide(token, same_device=[other])
        assert isinstance(refused, Denied)
        assert "kitchen" in refused.message
    assert decide(TOKEN, same_device=[replace(other, revoked=True)]) == Granted(True, ())


def test_a_lost_answer_is_given_again_without_a_use_even_by_a_token_that_is_used_up() -> None:
    lost = replace(HOLDER, token_id=TOKEN.token_id, used=False)
    assert decide(replace(TOKEN, uses_left=0), [lost]) == Granted(False, ("f1",))
    for not_lost in (replace(lost, used=True), replace(lost, device_id="device-0002"), replace(lost, revoked=True)):
        assert decide(replace(TOKEN, uses_left=0), [not_lost]) == tokens.UNGOOD


def test_a_secret_finds_its_own_token() -> None:
    secret = tokens.make()
    mine = replace(TOKEN, digest=tokens.digest(secret))
    assert tokens.find([TOKEN, mine], secret) == mine
    assert tokens.find([TOKEN, mine], secret[:-1]) is None
    assert len({tokens.make() for _ in range(100)}) == 100


def test_one_source_gets_its_tries_of_a_second_and_then_as_they_come_back() -> None:
    limiter = Limiter(per_source_s=10.0, of_all_s=100.0)
    assert [limiter.allows("a", 0.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert limiter.allows("b", 0.0)
    assert [limiter.allows("a", 0.25) for _ in range(4)] == [True, True, False, False]


def test_all_sources_together_have_a_limit() -> None:
    limiter = Limiter(per_source_s=10.0, of_all_s=100.0)
    assert sum(limiter.allows(f"source-{n}", 0.0) for n in range(1000)) == 100


def test_the_memory_of_sources_is_bounded() -> None:
    limiter = Limiter(sources_max=50)
    for n in range(1000):
        limiter.allows(f"source-{n}", n / 1000)
    assert len(limiter) == 50


def test_no_source_gets_more_than_its_rate_however_it_times_its_tries() -> None:
    chance = random.Random(1)
    limiter, now, let = Limiter(per_source_s=10.0, of_all_s=1e9), 0.0, 0
    for _ in range(5000):
        now += chance.expovariate(40.0)
        let += limiter.allows("a", now)
    assert let <= 10.0 * now + 10.0


@pytest.mark.parametrize(
    ("peer", "source"),
    [
        ("ipv4:192.0.2.1:4000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4000", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:9::1]:1", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:1", "192.0.2.1"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_a_source_is_what_one_machine_cannot_change_at_will(peer: str, source: str) -> None:
    assert tokens.source(peer) == source
