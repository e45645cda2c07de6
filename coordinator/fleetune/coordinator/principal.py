"""Who calls: read from the certificate of a connection, never from a message. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

Kind = Literal["agent", "operator", "local"]

AGENT_URI = "urn:fleetune:agent"
"""In the certificate of an agent, as `urn:fleetune:agent:DEVICE_ID`; without the id where another authority made it."""

OPERATOR_URI = "urn:fleetune:operator"
"""In the certificate of an operator, as `urn:fleetune:operator:ROLE`."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{7,63}", re.ASCII)


class Role(IntEnum):
    """What an operator may do; each includes those before it. The numbers are those of fleetune.v1.Role."""

    NONE = 0
    VIEW = 1
    OPERATE = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Principal:
    """One caller. `local` is whoever reaches a coordinator without TLS, which listens on loopback only: it may do everything."""

    kind: Kind
    name: str
    device_id: str = ""
    """Of an agent whose certificate names it; empty: the id that its name has in the fleet."""
    role: Role = Role.NONE
    fingerprint: str = ""
    """Hex SHA-256 of the certificate's DER; empty for `local`."""
    begins_unix_s: float = field(default=0.0, compare=False)
    """Since when the certificate is good; 0 where that was not read."""

    def __str__(self) -> str:
        return self.name if self.kind == "local" else f"{self.kind} {self.name}"


LOCAL = Principal("local", "local", role=Role.ADMIN)


def read(common_name: str, alternative_names: Sequence[str], fingerprint: str) -> Principal | None:
    """The principal of a certificate with this subject name and these alternative names; None where it is nobody's of a fleet."""
    ours = [name for name in alternative_names if name == AGENT_URI or name.startswith((f"{AGENT_URI}:", f"{OPERATOR_URI}:"))]
    if len(ours) != 1 or NAME.fullmatch(common_name) is None:
        return None
    last = ours[0].rpartition(":")[2]
    if ours[0].startswith(f"{OPERATOR_URI}:"):
        role = {"view": Role.VIEW, "operate": Role.OPERATE, "admin": Role.ADMIN}.get(last)
        return Principal("operator", common_name, role=role, fingerprint=fingerprint) if role is not None else None
    if ours[0] == AGENT_URI:
        return Principal("agent", common_name, fingerprint=fingerprint)
    return Principal("agent", common_name, device_id=last, fingerprint=fingerprint) if DEVICE_ID.fullmatch(last) else None
