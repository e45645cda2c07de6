"""Members of a real fleet: its authority, an operator and devices, made in the test's own process as the command lines make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc

from fleetune.agent import identity as devices
from fleetune.coordinator import config, initialise
from fleetune.v1 import registry_pb2, registry_pb2_grpc
from fleetune.wire import enrolment, identity
from fleetune.wire.identity import Identity
from fleetune.wire.joinline import JoinLine

OPERATOR = "tester"


def initialised(state_dir: Path, operator_folder: Path) -> Identity:
    """What `fleetune init` makes; the operator is an administrator."""
    settings = config.load(None, {}, {"state_dir": str(state_dir), "listen": "127.0.0.1:0"})
    initialise.initialise(settings, OPERATOR, operator_folder, "")
    made = identity.load(operator_folder)
    assert made is not None
    return made


def dialled(address: str, own: Identity | None) -> grpc.Channel:
    """A blocking channel, as a test wants it; None: plaintext."""
    # A connection of its own for each: a process-wide one would remember the coordinator's last death.
    options: list[tuple[str, int | str]] = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
    if own is None:
        return grpc.insecure_channel(address, options=options)
    options.append(("grpc.ssl_target_name_override", own.facts.server_name))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(own.roots, own.key, own.certificate), options=options)


def token(opened: grpc.Channel, address: str, uses: int = 1) -> JoinLine:
    """The line that `fleetune token create` prints, for devices; `address` is the one to dial."""
    request = registry_pb2.CreateTokenRequest(kind=registry_pb2.IDENTITY_KIND_AGENT, uses=uses, ttl_s=3600.0)
    answer = registry_pb2_grpc.RegistryServiceStub(opened).CreateToken(request, timeout=60, wait_for_ready=True)
    return JoinLine(address, answer.join_port, bytes.fromhex(answer.root_fingerprint), answer.token)


def enrolled(line: JoinLine, states: Sequence[tuple[str, Path]]) -> None:
    """Let devices join, each a name and a state folder; one that has joined before stays as it is."""
    for name, state_dir in states:
        folder = state_dir / "identity"
        if identity.load(folder) is None:
            identity.store(folder, enrolment.enrol(line, name, devices.device_id(state_dir)))


def joined(address: str, operator: Identity, states: Sequence[tuple[str, Path]]) -> None:
    """A token for all that have not joined yet, and their joining."""
    wanting = [(name, place) for name, place in states if identity.load(place / "identity") is None]
    if not wanting:
        return
    opened = dialled(address, operator)
    try:
        line = token(opened, address, len(wanting))
    finally:
        opened.close()
    enrolled(line, wanting)
