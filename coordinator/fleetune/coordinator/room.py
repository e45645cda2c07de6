"""Whether the disk has room for uploads: told to health probes and, through the engine, to whoever looks at a job.

Uploads are refused one by one where a blob does not fit; this says so before anybody tries, and takes it back by itself.
"""

from __future__ import annotations

import asyncio
import logging

from grpc_health.v1 import health, health_pb2

from fleetune.coordinator.rounds.engine import Engine
from fleetune.coordinator.store.blobs import BlobStore

log = logging.getLogger("fleetune.room")

LOOK_S = 1.0
"""Between two looks: the file system tells nobody when it is full or has room again."""


async def watch(engine: Engine, blobs: BlobStore, health_service: health.aio.HealthServicer, service: str) -> None:
    """Keep the health of `service`, which takes uploads, in step with the disk; ends by cancellation."""
    short = False
    while True:
        full = not blobs.has_room()
        engine.note_room("uploads", f"the disk of {blobs.root} is full: no uploads are taken" if full else "")
        if bool(engine.trouble) != short:
            short = not short
            if short:
                log.error("no uploads are taken: %s", engine.trouble)
            else:
                log.info("uploads are taken again")
            serving = health_pb2.HealthCheckResponse
            await health_service.set(service, serving.NOT_SERVING if short else serving.SERVING)
        await asyncio.sleep(LOOK_S)
