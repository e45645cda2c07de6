"""What is a device's own, decided from names alone."""

from __future__ import annotations

import pytest

from fleetune.coordinator.principal import LOCAL, Principal, Role
from fleetune.coordinator.rpc import ownership

NAMES = {"oak": "device-oak", "elm": "device-elm"}
OAK = Principal("agent", "oak", "device-oak")
BROUGHT = Principal("agent", "oak")
"""Another authority's certificate, which names no device id."""


@pytest.mark.parametrize(
    ("task_id", "device_id"),
    [
        ("echo-1a/1/device-oak/train", "device-oak"),
        ("echo-1a/1/device-oak/train/3", "device-oak"),
        ("echo-1a/1/device-oak", ""),
        ("a/b/c/d/e/f", ""),
        ("", ""),
        ("/" * 10_000, ""),
    ],
)
def test_a_tasks_id_names_its_device(task_id: str, device_id: str) -> None:
    assert ownership.device_of(task_id) == device_id


@pytest.mark.parametrize("caller", [OAK, BROUGHT])
def test_a_device_greets_and_delivers_as_itself_alone(caller: Principal) -> None:
    assert not ownership.greeting_objection(caller, "oak", "device-oak", NAMES)
    assert ownership.greeting_objection(caller, "oak", "device-elm", NAMES)
    assert ownership.greeting_objection(caller, "elm", "device-elm", NAMES)
    assert ownership.greeting_objection(caller, "oak", "device-new", NAMES)
    assert not ownership.task_objection(caller, "device-oak", "j/1/device-oak/train", NAMES)
    assert ownership.task_objection(caller, "device-elm", "j/1/device-elm/train", NAMES)
    assert ownership.task_objection(caller, "device-oak", "j/1/device-elm/train", NAMES)


def test_a_name_without_an_id_takes_the_first_that_is_nobodys() -> None:
    ash = Principal("agent", "ash")
    assert not ownership.greeting_objection(ash, "ash", "device-ash", NAMES)
    assert ownership.greeting_objection(ash, "ash", "device-oak", NAMES)
    assert ownership.task_objection(ash, "", "j/1/device-ash/train", NAMES)


def test_an_operator_has_no_device() -> None:
    ann = Principal("operator", "ann", role=Role.ADMIN)
    assert ownership.task_objection(ann, "", "", {})


def test_without_tls_nothing_is_known_and_nothing_is_refused() -> None:
    assert not ownership.greeting_objection(LOCAL, "oak", "device-elm", NAMES)
    assert not ownership.task_objection(LOCAL, "device-elm", "j/1/device-oak/train", NAMES)
