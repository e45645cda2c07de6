"""The facts that the owner's limits ask for, read no more than they ask."""

from __future__ import annotations

from pathlib import Path

from fleetune.agent.limits import Facts, Limits, metered_among
from fleetune.agent.probe import link, power
from fleetune.agent.probe.idle import OthersLoad


class OwnerProbe:
    """Reads facts for `limits.availability`; keeps the load's samples between calls. Owned by one task of the daemon."""

    def __init__(self, limits: Limits, coordinator_host: str, root: Path = Path("/"), *, declared_metered: bool = False) -> None:
        self._limits = limits
        self._host = coordinator_host
        self._root = root
        self._declared_metered = declared_metered
        self._load = OthersLoad()

    def facts(self, now_s: float) -> Facts:
        """The facts now; `now_s` is a monotonic clock. Call it every few seconds: the load needs samples."""
        return Facts(
            on_mains=power.on_mains(self._root) if self._limits.on_mains_only else None,
            others_cpu_percent=self._load.percent(now_s) if self._limits.idle_only else None,
            interfaces=() if self._limits.allow_metered else link.interfaces_towards(self._host, self._root),
            declared_metered=self._declared_metered,
        )

    def metered(self) -> bool:
        """Whether the way to the coordinator is paid by volume, whatever the limits say to that."""
        return self._declared_metered or bool(metered_among(self._limits, link.interfaces_towards(self._host, self._root)))
