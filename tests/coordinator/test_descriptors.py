"""How many connections the process's limit of descriptors leaves room for."""

from __future__ import annotations

import resource

import pytest

from fleetune.coordinator import descriptors


@pytest.mark.parametrize(
    ("soft", "connections"),
    [(256, 64), (1024, 256), (65_536, 64_768), (10**9, 100_000), (resource.RLIM_INFINITY, 100_000)],
)
def test_connections_leave_descriptors_for_files(monkeypatch: pytest.MonkeyPatch, soft: int, connections: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert descriptors.connections_max() == connections


@pytest.mark.parametrize(("soft", "hard", "then"), [(1024, 4096, 4096), (1024, resource.RLIM_INFINITY, 100_768), (4096, 4096, 4096)])
def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, then: int) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    assert descriptors.widen() == then
    assert limits[-1] == (then if len(limits) > 1 else soft, hard)


def test_a_system_that_refuses_more_leaves_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert descriptors.widen() == 1024
