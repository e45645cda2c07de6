"""The coordinator daemon: the one place where its parts are wired together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fleetune import allocator, logs
from fleetune.coordinator import descriptors, entrance, room, statelock
from fleetune.coordinator.certificates import Roster
from fleetune.coordinator.config import CoordinatorConfig
from fleetune.coordinator.entrance import Tls
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.registry import Registry, names_of
from fleetune.coordinator.rounds.engine import Engine, Settings
from fleetune.coordinator.rounds.host import ModelHost
from fleetune.coordinator.rpc import join
from fleetune.coordinator.rpc.blob import BlobService
from fleetune.coordinator.rpc.control import ControlService
from fleetune.coordinator.rpc.fleet import FleetService
from fleetune.coordinator.rpc.gate import Gate
from fleetune.coordinator.rpc.join import JoinService
from fleetune.coordinator.rpc.registry import Entrance, RegistryService
from fleetune.coordinator.store import records
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.coordinator.store.identities import Kind
from fleetune.v1 import blob_pb2, control_pb2, control_pb2_grpc, fleet_pb2, fleet_pb2_grpc, registry_pb2, registry_pb2_grpc
from fleetune.wire import channel, frames

log = logging.getLogger("fleetune.coordinator")

SPOOL_KEPT_S = 7 * 24 * 3600.0
"""An interrupted upload that nobody has taken up for so long is given up."""

KEPT_MEMORY_BYTES = 32 << 20
"""Freed memory that stays for the next chunks; the rest goes back to the system."""

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (fleet_pb2, "FleetService"),
        (blob_pb2, "BlobService"),
        (control_pb2, "ControlService"),
        (registry_pb2, "RegistryService"),
    )
)

_UPLOADS = blob_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name


def main(config: CoordinatorConfig) -> int:
    """Run until SIGTERM or SIGINT; the process's exit code. Raises FleetuneError for what a person must mend."""
    logs.configure(config.log_level, config.log_format)
    allocator.tune_for_chunks(KEPT_MEMORY_BYTES)
    descriptors.widen()
    entrance.check(config)
    with statelock.held(config.state_dir):
        try:
            import uvloop
        except ImportError:  # no wheel for this platform: asyncio's own loop is slower, not different
            return asyncio.run(_serve(config))
        return uvloop.run(_serve(config))


@dataclass(frozen=True)
class Running:
    """The open parts of a coordinator. `join_port` 0: nobody can join."""

    server: grpc.aio.Server
    engine: Engine
    fleet: FleetService
    blob_service: BlobService
    health_service: health.aio.HealthServicer
    roster: Roster
    gate: Gate
    tls: Tls | None
    port: int
    join_port: int


async def _serve(config: CoordinatorConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(config) as open_:
        engine, blob_service = open_.engine, open_.blob_service
        address = _at(config.listen, open_.port)
        allocator.settle()
        if open_.join_port:
            _write_address(config.state_dir, "join_address", _at(config.join_listen, open_.join_port))
        # The last, since scripts wait for it.
        _write_address(config.state_dir, "address", address)
        log.info(
            "ready address=%s join_port=%s tls=%s version=%s jobs=%d",
            address,
            open_.join_port or "none",
            "no, plaintext" if open_.tls is None else "own authority" if open_.tls.authority is not None else "other authority",
            _version(),
            len(engine.jobs),
        )
        writer = asyncio.create_task(engine.run(), name="engine")
        stopping = asyncio.create_task(stop.wait(), name="stop signal")
        try:
            await asyncio.wait({writer, stopping}, return_when=asyncio.FIRST_COMPLETED)
            failed = writer.done()
            if failed and (error := writer.exception()) is not None:
                log.critical("the engine failed; nothing that was acknowledged is lost, start again", exc_info=error)
            await open_.health_service.enter_graceful_shutdown()
            open_.fleet.drain("the coordinator stops")
            log.info("draining grace_s=%g uploads=%d", config.drain_grace_s, blob_service.receiving)
            await blob_service.idle(config.drain_grace_s if not failed else 0.0)
            open_.fleet.hang_up()
            await open_.server.stop(grace=min(1.0, config.drain_grace_s))
        finally:
            for task in (writer, stopping):
                task.cancel()
            await asyncio.gather(writer, stopping, return_exceptions=True)
            for name in ("address", "join_address"):
                (config.state_dir / name).unlink(missing_ok=True)
    log.info("stopped")
    return 1 if failed else 0


@contextlib.asynccontextmanager
async def running(config: CoordinatorConfig) -> AsyncGenerator[Running]:
    """Everything opened in order, and closed in the opposite one."""
    tls = entrance.open_tls(config, time.time())
    database = Database(config.state_dir / "coordinator.sqlite")
    try:
        await database.open()
        blobs = BlobStore(config.state_dir)
        blobs.clean_spool(SPOOL_KEPT_S)
        devices = await database.read(records.load_devices)
        epoch = await database.read(lambda connection: int(records.read_meta(connection, "epoch") or "1"))
        restored = await database.read(lambda connection: records.read_meta(connection, records.RESTORED_KEY))
        if restored is not None:
            log.warning("running from a restored state: %s; results of other epochs than %d are refused", restored, epoch)
        roster = Roster(database, tls.authority if tls is not None else None, config.certificate_days)
        await roster.open()
        registry = Registry(config.lease_s, dict(names_of((d.device_id, d.name) for d in devices)), quarantined=roster.quarantined)
        settings = Settings(config.state_dir, config.keep_rounds, config.parallel_jobs, absent_grace_s=config.lease_s)
        engine = Engine(settings, database, blobs, registry, ModelHost())
        try:
            await engine.open()
            fleet = FleetService(engine, registry, database, version=_version(), heartbeat_s=config.heartbeat_s, epoch=epoch)
            engine.attach(fleet)
            blob_service = BlobService(
                engine, blobs, transfers_at_once=config.transfers_at_once, max_update_bytes=config.max_update_bytes, epoch=epoch
            )
            gate = Gate(roster.standing, plaintext=tls is None)
            most = ("grpc.max_allowed_incoming_connections", descriptors.connections_max())
            server = grpc.aio.server(interceptors=[gate], options=[*channel.server_options(), most])
            fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
            frames.add_to_server(blob_service, server)
            control = ControlService(engine, fleet, registry, database, _version(), roster)
            control_pb2_grpc.add_ControlServiceServicer_to_server(control, server)
            ports: dict[str, int] = {"listen": 0, "join": 0}

            def at_the_door() -> Entrance:
                stored, root = (tls.address, tls.server_root) if tls is not None else ("", "")
                return Entrance(entrance.dialled(config, stored, ports["listen"]), ports["join"], root)

            registry_service = RegistryService(roster, gate, at_the_door, engine.availability_changed)
            registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry_service, server)
            health_service = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
            reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
            ports["listen"] = _bind(server, config.listen, tls, mutual=True)
            joining = _joining(config, tls, roster, registry, gate)
            ports["join"] = _bind(joining, config.join_listen, tls, mutual=False) if joining is not None else 0
            await server.start()
            if joining is not None:
                await joining.start()
            for name in ("", *_SERVICES):
                await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
            watching = [asyncio.create_task(room.watch(engine, blobs, health_service, _UPLOADS), name="room on the disk")]
            if tls is not None:
                watching.append(asyncio.create_task(entrance.follow(tls, roster, fleet), name="TLS files"))
            try:
                yield Running(server, engine, fleet, blob_service, health_service, roster, gate, tls, ports["listen"], ports["join"])
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
                if joining is not None:
                    await joining.stop(grace=0)
                await server.stop(grace=0)
                blob_service.close()
        finally:
            await engine.close()
            await roster.close()
    finally:
        await database.close()


def _joining(config: CoordinatorConfig, tls: Tls | None, roster: Roster, registry: Registry, gate: Gate) -> grpc.aio.Server | None:
    """The small server for those who have no certificate yet; None where nobody can get one here."""
    if tls is None or tls.authority is None:
        return None

    def joined(name: str, device_id: str) -> None:
        for known in [known for known, holder in registry.names.items() if holder == device_id and known != name]:
            del registry.names[known]
        registry.names[name] = device_id

    server = grpc.aio.server(options=join.options(), maximum_concurrent_rpcs=join.CALLS_MAX)
    service = JoinService(roster, on_replaced=lambda kind, name: _cut(gate, kind, name), on_joined=joined)
    registry_pb2_grpc.add_JoinServiceServicer_to_server(service, server)
    return server


def _cut(gate: Gate, kind: Kind, name: str) -> None:
    gate.cut(kind, name, "another machine has taken over this name")


def _bind(server: grpc.aio.Server, listen: str, tls: Tls | None, *, mutual: bool) -> int:
    try:
        return (
            server.add_insecure_port(listen) if tls is None else server.add_secure_port(listen, tls.handshakes.credentials(mutual=mutual))
        )
    except RuntimeError as error:
        option = "--listen" if mutual else "--join-listen"
        raise MachineError(
            f"the address {listen} cannot be listened on: it is taken, or not one of this machine's.",
            f"Stop what uses it, or choose another with {option} (port 0 takes any free one).",
        ) from error


def _at(listen: str, port: int) -> str:
    return f"{listen.rpartition(':')[0]}:{port}"


def _write_address(state_dir: Path, name: str, address: str) -> None:
    """Tell scripts where the coordinator listens once it is ready (port 0 lets the system choose)."""
    aside = state_dir / f".{name}"
    aside.write_text(address + "\n", encoding="ascii")
    os.replace(aside, state_dir / name)


def _version() -> str:
    return importlib.metadata.version("fleetune")
