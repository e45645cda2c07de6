"""The coordinator daemon: the one place where its parts are wired together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import logging
import os
import signal
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import IO

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fleetune import allocator, logs
from fleetune.coordinator import room
from fleetune.coordinator.config import CoordinatorConfig
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.registry import Registry, names_of
from fleetune.coordinator.rounds.engine import Engine, Settings
from fleetune.coordinator.rounds.host import ModelHost
from fleetune.coordinator.rpc.blob import BlobService
from fleetune.coordinator.rpc.control import ControlService
from fleetune.coordinator.rpc.fleet import FleetService
from fleetune.coordinator.store import records
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.coordinator.store.db import Database
from fleetune.errors import ConfigError
from fleetune.v1 import blob_pb2, control_pb2, control_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from fleetune.wire import channel, frames

log = logging.getLogger("fleetune.coordinator")

SPOOL_KEPT_S = 7 * 24 * 3600.0
"""An interrupted upload that nobody has taken up for so long is given up."""

KEPT_MEMORY_BYTES = 32 << 20
"""Freed memory that stays for the next chunks; the rest goes back to the system."""

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((fleet_pb2, "FleetService"), (blob_pb2, "BlobService"), (control_pb2, "ControlService"))
)

_UPLOADS = blob_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name


def main(config: CoordinatorConfig) -> int:
    """Run until SIGTERM or SIGINT; the process's exit code. Raises FleetuneError for what a person must mend."""
    logs.configure(config.log_level, config.log_format)
    allocator.tune_for_chunks(KEPT_MEMORY_BYTES)
    check_listen(config)
    with _locked(config.state_dir):
        try:
            import uvloop
        except ImportError:  # no wheel for this platform: asyncio's own loop is slower, not different
            return asyncio.run(_serve(config))
        return uvloop.run(_serve(config))


def check_listen(config: CoordinatorConfig) -> None:
    """Without TLS, an address that other machines reach needs the operator's word. Raises ConfigError."""
    host = config.listen.rpartition(":")[0]
    if channel.is_loopback(host):
        return
    if not config.insecure_listen:
        raise ConfigError(
            f"listen = {config.listen!r} can be reached from other machines, and nothing on it is encrypted or authenticated.",
            "Listen on 127.0.0.1 and reach it through a tunnel, or say --insecure-listen if everybody on that network may use it.",
        )
    log.warning("listening on %s without encryption or authentication: whoever reaches it can use it and read along", config.listen)


async def _serve(config: CoordinatorConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(config) as (server, engine, fleet, blob_service, health_service, port):
        host = config.listen.rpartition(":")[0]
        address = f"{host}:{port}"
        _write_address(config.state_dir, address)
        allocator.settle()
        log.info("ready address=%s version=%s jobs=%d", address, _version(), len(engine.jobs))
        writer = asyncio.create_task(engine.run(), name="engine")
        stopping = asyncio.create_task(stop.wait(), name="stop signal")
        try:
            await asyncio.wait({writer, stopping}, return_when=asyncio.FIRST_COMPLETED)
            failed = writer.done()
            if failed and (error := writer.exception()) is not None:
                log.critical("the engine failed; nothing that was acknowledged is lost, start again", exc_info=error)
            await health_service.enter_graceful_shutdown()
            fleet.drain("the coordinator stops")
            log.info("draining grace_s=%g uploads=%d", config.drain_grace_s, blob_service.receiving)
            await blob_service.idle(config.drain_grace_s if not failed else 0.0)
            fleet.hang_up()
            await server.stop(grace=min(1.0, config.drain_grace_s))
        finally:
            for task in (writer, stopping):
                task.cancel()
            await asyncio.gather(writer, stopping, return_exceptions=True)
            (config.state_dir / "address").unlink(missing_ok=True)
    log.info("stopped")
    return 1 if failed else 0


@contextlib.asynccontextmanager
async def running(
    config: CoordinatorConfig,
) -> AsyncGenerator[tuple[grpc.aio.Server, Engine, FleetService, BlobService, health.aio.HealthServicer, int]]:
    """Everything opened in order, and closed in the opposite one."""
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
        registry = Registry(config.lease_s, dict(names_of((d.device_id, d.name) for d in devices)))
        settings = Settings(config.state_dir, config.keep_rounds, config.parallel_jobs, absent_grace_s=config.lease_s)
        engine = Engine(settings, database, blobs, registry, ModelHost())
        try:
            await engine.open()
            fleet = FleetService(engine, registry, database, version=_version(), heartbeat_s=config.heartbeat_s, epoch=epoch)
            engine.attach(fleet)
            blob_service = BlobService(
                engine, blobs, uploads_at_once=config.uploads_at_once, max_update_bytes=config.max_update_bytes, epoch=epoch
            )
            server = grpc.aio.server(options=channel.server_options())
            fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
            frames.add_to_server(blob_service, server)
            control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(engine, fleet, registry, database, _version()), server)
            health_service = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
            reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
            port = _bind(server, config.listen)
            await server.start()
            for name in ("", *_SERVICES):
                await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
            looking = asyncio.create_task(room.watch(engine, blobs, health_service, _UPLOADS), name="room on the disk")
            try:
                yield server, engine, fleet, blob_service, health_service, port
            finally:
                looking.cancel()
                await asyncio.gather(looking, return_exceptions=True)
                await server.stop(grace=0)
                blob_service.close()
        finally:
            await engine.close()
    finally:
        await database.close()


def _bind(server: grpc.aio.Server, listen: str) -> int:
    try:
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise MachineError(
            f"the address {listen} cannot be listened on: it is taken, or not one of this machine's.",
            "Stop what uses it, or choose another with --listen (port 0 takes any free one).",
        ) from error


@contextlib.contextmanager
def _locked(state_dir: Path) -> Generator[IO[str]]:
    """One coordinator per state_dir: the lock ends with the process, however it ends."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (state_dir / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"state_dir {state_dir} cannot be used: {error.strerror}.", "Name another with --state-dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise MachineError(
                f"state_dir {state_dir} is in use by another coordinator (process {owner}).",
                "Stop that one, or name another with --state-dir.",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


def _write_address(state_dir: Path, address: str) -> None:
    """Tell scripts where the coordinator listens once it is ready (port 0 lets the system choose)."""
    aside = state_dir / ".address"
    aside.write_text(address + "\n", encoding="ascii")
    os.replace(aside, state_dir / "address")


def _version() -> str:
    return importlib.metadata.version("fleetune")
