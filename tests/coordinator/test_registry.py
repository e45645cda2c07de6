"""Who is connected, under which name, and who may take a task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleetune.coordinator.domain import Candidate
from fleetune.coordinator.registry import REFUSAL_PAUSE_S, Greeting, Needs, Refused, Registry, Session, lacks, names_of

METHODS = frozenset({"echo", "fedavg_lora"})
INTENTS = frozenset({"intents"})
PI = Greeting("id-pi", "pi", "run-1", frozenset({"kitchen", "arm"}), INTENTS, INTENTS, INTENTS, METHODS, address="10.0.0.7:1")
NEEDS = Needs("fedavg_lora", "intents", frozenset({"arm"}))


@pytest.fixture
def registry() -> Registry:
    return Registry(lease_s=15.0)


def opened(registry: Registry, greeting: Greeting = PI, now_s: float = 0.0) -> Session:
    session = registry.admit(greeting, now_s)
    assert isinstance(session, Session)
    return session


def ready(registry: Registry, needs: Needs = NEEDS, busy: tuple[str, ...] = (), now_s: float = 0.0) -> list[str]:
    return [candidate.name for candidate in registry.candidates(needs, busy, now_s)]


def test_the_same_agent_process_replaces_its_own_session(registry: Registry) -> None:
    old = opened(registry)
    new = opened(registry, now_s=1.0)
    assert new is not old
    assert not registry.leave(old), "the old stream's end is not the device's"
    assert ready(registry) == ["pi"]
    assert registry.leave(new)
    assert ready(registry) == []


def test_a_second_agent_with_a_copied_id_is_refused_by_name(registry: Registry) -> None:
    opened(registry)
    refused = registry.admit(replace(PI, name="copy", instance_id="run-2", address="10.0.0.8:1"), 5.0)
    assert isinstance(refused, Refused)
    assert refused.kind == "duplicate_id"
    assert "'pi'" in refused.message
    assert "'copy'" in refused.message
    assert "10.0.0.7" in refused.message
    assert refused.retry_after_s == pytest.approx(10.0)
    assert "copy" not in registry.names


def test_a_restarted_agent_takes_over_a_session_that_fell_silent(registry: Registry) -> None:
    opened(registry)
    assert isinstance(registry.admit(replace(PI, instance_id="run-2"), 14.9), Refused)
    assert isinstance(registry.admit(replace(PI, instance_id="run-2"), 15.0), Session)


def test_a_session_that_is_heard_of_is_not_taken_over(registry: Registry) -> None:
    opened(registry).last_heard_s = 14.0
    assert isinstance(registry.admit(replace(PI, instance_id="run-2"), 20.0), Refused)


def test_a_name_belongs_to_one_device_even_while_it_is_away(registry: Registry) -> None:
    registry.leave(opened(registry))
    refused = registry.admit(replace(PI, device_id="id-other"), 1.0)
    assert isinstance(refused, Refused)
    assert (refused.kind, refused.retry_after_s) == ("name_taken", 0.0)
    assert "id-pi" in refused.message


def test_a_renamed_device_gives_its_old_name_free(registry: Registry) -> None:
    opened(registry)
    opened(registry, replace(PI, name="kitchen-pi"))
    assert registry.names == {"kitchen-pi": "id-pi"}
    assert isinstance(registry.admit(replace(PI, device_id="id-other"), 1.0), Session)


def test_names_of_earlier_runs_are_known(registry: Registry) -> None:
    registry = Registry(15.0, dict(names_of([("id-1", "pi")])))
    assert isinstance(registry.admit(PI, 0.0), Refused)


@pytest.mark.parametrize(
    ("needs", "lacking"),
    [
        (NEEDS, ""),
        (Needs("echo", "", frozenset()), ""),
        (Needs("fedkseed", "intents", frozenset()), "method 'fedkseed'"),
        (Needs("echo", "trec", frozenset()), "no data named 'trec'"),
        (Needs("echo", "", frozenset({"arm", "zoo", "attic"})), "the tag attic, zoo"),
    ],
)
def test_what_a_device_lacks_is_said(registry: Registry, needs: Needs, lacking: str) -> None:
    opened(registry)
    assert lacking in lacks(PI, needs)
    assert (ready(registry, needs) == ["pi"]) is (lacking == "")
    assert ("pi" in registry.explain(needs, (), 0.0)) is (lacking != "")


def test_a_busy_device_is_no_candidate_and_says_so(registry: Registry) -> None:
    opened(registry)
    assert ready(registry, busy=("id-pi",)) == []
    assert registry.explain(NEEDS, ("id-pi",), 0.0) == {"pi": "works on another task"}


def test_a_device_whose_owner_forbids_it_waits_for_another_word(registry: Registry) -> None:
    session = opened(registry, replace(PI, accepts_tasks=False, reason="on battery"))
    assert ready(registry, now_s=1e9) == []
    assert registry.explain(NEEDS, (), 0.0) == {"pi": "on battery"}
    assert registry.next_return_s(0.0) is None
    registry.announce(session, True, "")
    assert ready(registry) == ["pi"]


def test_a_refusal_pauses_a_device_until_it_speaks_or_the_pause_ends(registry: Registry) -> None:
    session = opened(registry)
    registry.refused(session, "8 tasks wait", 100.0)
    assert ready(registry, now_s=100.0) == []
    assert registry.explain(NEEDS, (), 100.0) == {"pi": "8 tasks wait"}
    assert registry.next_return_s(100.0) == 100.0 + REFUSAL_PAUSE_S
    assert ready(registry, now_s=100.0 + REFUSAL_PAUSE_S) == ["pi"]
    registry.refused(session, "8 tasks wait", 200.0)
    registry.announce(session, True, "")
    assert ready(registry, now_s=200.0) == ["pi"]


@pytest.mark.parametrize(
    ("train", "validation", "offered"),
    [
        (INTENTS, INTENTS, Candidate("id-pi", "pi", trains=True, evaluates=True)),
        (INTENTS, frozenset[str](), Candidate("id-pi", "pi", trains=True, evaluates=False)),
        (frozenset[str](), INTENTS, Candidate("id-pi", "pi", trains=False, evaluates=True)),
    ],
)
def test_a_device_is_offered_for_what_it_has_rows_of(
    registry: Registry, train: frozenset[str], validation: frozenset[str], offered: Candidate
) -> None:
    opened(registry, replace(PI, train_data_names=train, validation_data_names=validation))
    assert registry.candidates(NEEDS, (), 0.0) == (offered,)


def test_a_job_without_data_takes_every_device_for_both(registry: Registry) -> None:
    opened(registry, replace(PI, train_data_names=frozenset(), validation_data_names=frozenset()))
    assert registry.candidates(Needs("echo", "", frozenset()), (), 0.0) == (Candidate("id-pi", "pi"),)


def test_why_a_device_that_only_measures_is_not_counted_is_said(registry: Registry) -> None:
    opened(registry, replace(PI, train_data_names=frozenset()))
    assert registry.explain(NEEDS, {"id-pi"}, 0.0) == {"pi": "it has only validation rows of 'intents'"}
