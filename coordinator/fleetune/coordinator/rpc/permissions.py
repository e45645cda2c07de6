"""Which method is open to whom: one table, and what is not in it is open to nobody. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fleetune.coordinator.principal import Principal, Role


@dataclass(frozen=True)
class Rule:
    """Who may call a method, and how many of its calls one caller may have open."""

    agents: bool
    role: Role | None
    """The least role of an operator that may call it; None: no operator may."""
    at_once: int = 16


_FLEET = "/fleetune.v1.FleetService/"
_BLOB = "/fleetune.v1.BlobService/"
_CONTROL = "/fleetune.v1.ControlService/"
_REGISTRY = "/fleetune.v1.RegistryService/"

_VIEW, _OPERATE, _ADMIN = (Rule(agents=False, role=role) for role in (Role.VIEW, Role.OPERATE, Role.ADMIN))

RULES: Mapping[str, Rule] = {
    # A link that flaps leaves streams behind that nobody has noticed yet; only one of them is the device's session.
    f"{_FLEET}Session": Rule(agents=True, role=None, at_once=4),
    f"{_BLOB}Upload": Rule(agents=True, role=None, at_once=4),
    f"{_BLOB}UploadStatus": Rule(agents=True, role=None, at_once=8),
    f"{_BLOB}Probe": Rule(agents=True, role=None, at_once=2),
    f"{_BLOB}Download": Rule(agents=True, role=Role.VIEW, at_once=8),
    **{
        f"{_CONTROL}{method}": _VIEW
        for method in ("ServerInfo", "ValidateJob", "ListJobs", "GetJob", "ListDevices", "DescribeAdapter", "GetLogs")
    },
    f"{_CONTROL}WatchJob": Rule(agents=False, role=Role.VIEW, at_once=64),
    **{f"{_CONTROL}{method}": _OPERATE for method in ("SubmitJob", "CancelJob", "PauseJob", "ResumeJob", "CollectGarbage")},
    f"{_CONTROL}ListAudit": _ADMIN,
    f"{_REGISTRY}Renew": Rule(agents=True, role=Role.VIEW, at_once=2),
    **{
        f"{_REGISTRY}{method}": _ADMIN
        for method in ("CreateToken", "ListTokens", "RevokeToken", "ListCertificates", "RevokeIdentity", "SetQuarantine")
    },
    **{f"/grpc.health.v1.Health/{method}": Rule(agents=True, role=Role.VIEW) for method in ("Check", "List", "Watch")},
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(agents=True, role=Role.VIEW, at_once=4),
}
"""By the full path of the method, as gRPC spells it."""


def objection(principal: Principal, method: str) -> str:
    """Why `principal` may not call `method`, for a person; empty where it may."""
    if principal.kind == "local":
        return ""
    rule = RULES.get(method)
    if rule is None:
        return "nobody may call it"
    if principal.kind == "agent":
        return "" if rule.agents else "it is for operators, and this is the certificate of a device"
    if rule.role is None:
        return "it is for devices, and this is the certificate of an operator"
    if principal.role < rule.role:
        return f"it needs the role {rule.role.name.lower()}, and this certificate has {principal.role.name.lower()}"
    return ""


def at_once(principal: Principal, method: str) -> int | None:
    """How many calls of `method` this caller may have open; None: as many as the connection carries."""
    rule = RULES.get(method)
    return None if principal.kind == "local" or rule is None else rule.at_once
