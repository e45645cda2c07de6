"""Who somebody is stands in the certificate, in one exact form, or nowhere."""

from __future__ import annotations

import pytest

from fleetune.coordinator import principal
from fleetune.coordinator.principal import Principal, Role

PRINT = "ab" * 32


def test_an_agent_is_known_by_its_name_and_its_id() -> None:
    found = principal.read("kitchen-pi", ["urn:fleetune:agent:0123456789abcdef"], PRINT)
    assert found == Principal("agent", "kitchen-pi", "0123456789abcdef", Role.NONE, PRINT)


def test_another_authority_may_leave_the_id_out() -> None:
    assert principal.read("kitchen-pi", ["kitchen.example.org", "urn:fleetune:agent"], PRINT) == Principal(
        "agent", "kitchen-pi", fingerprint=PRINT
    )


@pytest.mark.parametrize(("word", "role"), [("view", Role.VIEW), ("operate", Role.OPERATE), ("admin", Role.ADMIN)])
def test_an_operators_role_stands_in_the_certificate(word: str, role: Role) -> None:
    assert principal.read("ada", [f"urn:fleetune:operator:{word}"], PRINT) == Principal("operator", "ada", role=role, fingerprint=PRINT)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("kitchen-pi", []),
        ("kitchen-pi", ["urn:fleetune:agentx"]),
        ("kitchen-pi", ["urn:fleetune:agent:"]),
        ("kitchen-pi", ["urn:fleetune:agent:../../x"]),
        ("kitchen pi", ["urn:fleetune:agent:0123456789abcdef"]),
        ("", ["urn:fleetune:agent:0123456789abcdef"]),
        ("ada", ["urn:fleetune:operator"]),
        ("ada", ["urn:fleetune:operator:root"]),
        # Two at once would leave it to whoever reads which of them holds.
        ("ada", ["urn:fleetune:operator:view", "urn:fleetune:operator:admin"]),
        ("ada", ["urn:fleetune:agent:0123456789abcdef", "urn:fleetune:operator:admin"]),
    ],
)
def test_anything_else_is_nobody(name: str, others: list[str]) -> None:
    assert principal.read(name, others, PRINT) is None
