"""A new certificate for an operator who has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.coordinator import operator
from fleetune.errors import UnsupportedError
from fleetune.wire import enrolment, keys

if TYPE_CHECKING:
    from fleetune.coordinator.fleet_client import FleetClient
    from fleetune.wire.identity import Identity


async def renew(client: FleetClient, folder: Path) -> Identity:
    """Ask for it on this connection and put it into `folder`. UnsupportedError in plaintext, ConfigError, what asking raises."""
    old = client.identity
    if old is None:
        raise UnsupportedError("without TLS there is no certificate to renew.", "Leave --plaintext out.")
    request = keys.make_request(old.facts.name)
    made = enrolment.identity_of(await client.renew(request.signing_request), request.key, old.facts.coordinator)
    keys.check(made)
    operator.put(folder, made)
    return made
