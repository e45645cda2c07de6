"""The coordinator daemon: the one place where its parts are wired together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fleetune import allocator, logs
from fleetune.coordinator import descriptors, entrance, hangup, haste, room, statelock, tlsfolder
from fleetune.coordinator.certificates import Roster
from fleetune.coordinator.config import CoordinatorConfig
from fleetune.coordinator.door import LOOPBACK, Door
from fleetune.coordinator.entrance import Follower, Tls
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.metrics.snapshot import Sources
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
from fleetune.supervisor import Supervisor
from fleetune.v1 import blob_pb2, control_pb2, control_pb2_grpc, fleet_pb2, fleet_pb2_grpc, registry_pb2, registry_pb2_grpc
from fleetune.wire import channel, frames

if TYPE_CHECKING:
    from fleetune.coordinator.metrics.service import Metrics

log = logging.getLogger("fleetune.coordinator")

SPOOL_KEPT_S = 7 * 24 * 3600.0
"""An interrupted upload that nobody has taken up for so long is given up."""

FAILED_END_S = 1.0
"""An orderly end after a failed flush; a disk that fails may keep the threads that wait for it as long as it likes."""

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
    supervisor = Supervisor.from_environment(os.environ)
    allocator.tune_for_chunks(KEPT_MEMORY_BYTES)
    descriptors.widen()
    entrance.check(config)
    with statelock.held(config.state_dir):
        try:
            import uvloop
        except ImportError:  # no wheel for this platform: asyncio's own loop is slower, not different
            return asyncio.run(_serve(config, supervisor, haste.end_within))
        return uvloop.run(_serve(config, supervisor, haste.end_within))


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
    follower: Follower | None
    """None in plaintext."""
    port: int
    join_port: int
    metrics: Metrics | None = None
    """None where nobody asked for them."""


async def _serve(config: CoordinatorConfig, supervisor: Supervisor, in_haste: Callable[[float, int], None] | None = None) -> int:
    """`in_haste` ends the whole process where the end after a failure takes too long; only for one that is nobody else's."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(config) as open_:
        engine, blob_service = open_.engine, open_.blob_service
        hangup.listen(config.state_dir, open_.follower, stop)
        address = _at(config.listen, open_.port)
        allocator.settle()
        if open_.metrics is not None:
            _write_address(config.state_dir, "metrics_address", _at(config.metrics_listen, open_.metrics.port))
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
        watched = asyncio.create_task(supervisor.watch(lambda: _words(open_, address)), name="supervisor")
        supervisor.ready(_words(open_, address))
        try:
            await asyncio.wait({writer, stopping}, return_when=asyncio.FIRST_COMPLETED)
            supervisor.stopping("lets uploads end")
            failed = writer.done()
            if failed and (error := writer.exception()) is not None:
                log.critical("the engine failed; nothing that was acknowledged is lost, start again", exc_info=error)
                if in_haste is not None:
                    in_haste(FAILED_END_S, 1)
            await open_.health_service.enter_graceful_shutdown()
            open_.fleet.drain("the coordinator stops")
            log.info("draining grace_s=%g uploads=%d", config.drain_grace_s, blob_service.receiving)
            await blob_service.idle(config.drain_grace_s if not failed else 0.0)
            open_.fleet.hang_up()
            # Where a flush failed nothing more can be acknowledged: whoever still sends would wait for an answer that cannot come.
            await open_.server.stop(grace=0.0 if failed else min(1.0, config.drain_grace_s))
        finally:
            for task in (writer, stopping, watched):
                task.cancel()
            await asyncio.gather(writer, stopping, watched, return_exceptions=True)
            for name in ("address", "join_address", "metrics_address"):
                (config.state_dir / name).unlink(missing_ok=True)
    log.info("stopped")
    return 1 if failed else 0


def _words(open_: Running, address: str) -> str:
    """What this coordinator does now, for `systemctl status`."""
    at_work = [job_id for job_id, job in open_.engine.jobs.items() if not job.ended]
    jobs = "no job" if not at_work else f"job {at_work[0]}" if len(at_work) == 1 else f"{len(at_work)} jobs"
    return f"listens on {address}, {len(open_.engine.registry.sessions)} devices connected, {jobs}"


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
        metrics: Metrics | None = None
        try:
            await engine.open()
            fleet = FleetService(
                engine,
                registry,
                database,
                version=_version(),
                heartbeat_s=config.heartbeat_s,
                epoch=epoch,
                is_behind=lambda device_id: entrance.is_behind(roster, device_id),
            )
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
            if config.metrics_listen:
                metrics = await _metrics(config, Sources(_version(), epoch, engine, registry, fleet, blob_service, roster, gate, devices))
            # First: where it is taken, nothing else is open yet.
            door = Door()
            joining = _joining(tls, roster, registry, gate, door)
            ports["join"] = await door.open(config.join_listen) if joining is not None else 0
            try:
                ports["listen"] = _bind(server, config.listen, tls, mutual=True)
                if joining is not None:
                    door.leads_to(_bind(joining, f"{LOOPBACK}:0", tls, mutual=False))
            except MachineError:
                await door.close()
                raise
            await server.start()
            if joining is not None:
                await joining.start()
            for name in ("", *_SERVICES):
                await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
            watching = [asyncio.create_task(room.watch(engine, blobs, health_service, _UPLOADS), name="room on the disk")]
            follower = Follower(tls, tlsfolder.of(config.state_dir), roster, fleet) if tls is not None else None
            if follower is not None:
                watching.append(asyncio.create_task(follower.run(), name="TLS files"))
            try:
                yield Running(
                    server,
                    engine,
                    fleet,
                    blob_service,
                    health_service,
                    roster,
                    gate,
                    tls,
                    follower,
                    ports["listen"],
                    ports["join"],
                    metrics,
                )
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
                await door.close()
                if joining is not None:
                    await joining.stop(grace=0)
                await server.stop(grace=0)
                blob_service.close()
        finally:
            if metrics is not None:
                await metrics.close()
            await engine.close()
            await roster.close()
    finally:
        await database.close()


async def _metrics(config: CoordinatorConfig, sources: Sources) -> Metrics:
    from fleetune.coordinator.metrics.service import Metrics  # here, since Prometheus' library is only for who asks for metrics

    made = Metrics(config, sources)
    await made.open()
    return made


def _joining(tls: Tls | None, roster: Roster, registry: Registry, gate: Gate, door: Door) -> grpc.aio.Server | None:
    """The small server behind the door, for those who have no certificate yet; None where nobody can get one here."""
    if tls is None or tls.authority is None:
        return None

    def joined(name: str, device_id: str) -> None:
        for known in [known for known, holder in registry.names.items() if holder == device_id and known != name]:
            del registry.names[known]
        registry.names[name] = device_id

    server = grpc.aio.server(options=join.options(), maximum_concurrent_rpcs=join.CALLS_MAX)
    service = JoinService(roster, on_replaced=lambda kind, name: _cut(gate, kind, name), on_joined=joined, source_of=door.source_of)
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
        raise MachineError(
            f"the address {listen} cannot be listened on: it is taken, or not one of this machine's.",
            "Stop what uses it, or choose another with --listen (port 0 takes any free one).",
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
