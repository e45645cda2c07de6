"""The metrics of a running coordinator: a snapshot on the event loop, everything else on a thread of their own."""

from __future__ import annotations

import asyncio
import logging
import time

from fleetune.coordinator.config import CoordinatorConfig
from fleetune.coordinator.metrics import figures, snapshot
from fleetune.coordinator.metrics.exposition import Exposition
from fleetune.coordinator.metrics.figures import Reading
from fleetune.coordinator.metrics.listener import Certificate, Listener, Pair
from fleetune.coordinator.metrics.request import Request
from fleetune.coordinator.metrics.shelf import Certificates, Shelf
from fleetune.coordinator.metrics.snapshot import Snapshot, Sources
from fleetune.coordinator.metrics.tally import Tally
from fleetune.errors import ConfigError
from fleetune.wire import channel
from fleetune.workers import Workers

log = logging.getLogger("fleetune.metrics")

FRESH_S = 1.0
"""A text this old is given again: however many readers there are, the figures are told once a second."""

OPENMETRICS = "application/openmetrics-text"
_OPENMETRICS_1 = f"{OPENMETRICS}; version=1.0.0"


class Metrics:
    """Open while the coordinator serves."""

    def __init__(self, config: CoordinatorConfig, sources: Sources) -> None:
        own = config.state_dir / "tls"
        pair = None
        if not config.plaintext:
            pair = Pair(config.tls.certificate, config.tls.key) if config.tls else Pair(own / "server.pem", own / "server.key")
        remote = not channel.is_loopback(config.metrics_listen.rpartition(":")[0])
        if remote and (pair is None or config.metrics_bearer_file is None):
            raise ConfigError(
                f"metrics.listen = {config.metrics_listen!r} can be reached from other machines, without certificate or secret.",
                "Listen on 127.0.0.1, or leave plaintext out and set metrics.bearer_file.",
            )
        self._listen = config.metrics_listen
        self._sources = sources
        self._seen_unix_s = {device.device_id: device.last_seen_unix_s for device in sources.devices}
        self.tally = Tally()
        sources.engine.on_committed = self.tally.committed
        self._workers = Workers("metrics")
        ends = Certificates(pair.certificate, None if config.tls else own / "roots.pem") if pair else None
        self._shelf = Shelf(config.state_dir, ends)
        self._exposition = Exposition()
        self._listener = Listener(self._answer, Certificate(pair) if pair and remote else None, config.metrics_bearer_file)
        self._turn = asyncio.Lock()
        self._told: dict[tuple[bool, bool], tuple[float, bytes, str]] = {}
        """By format and compression: when it was made, the text and its type."""
        self._snapshot_s = 0.0
        self._render_s = 0.0

    @property
    def port(self) -> int:
        return self._listener.port

    async def open(self) -> None:
        """Raises MachineError where the address is taken, ConfigError for files that cannot be used."""
        await self._listener.open(self._listen)
        log.info("metrics at %s port=%d", self._listen, self.port)

    async def close(self) -> None:
        await self._listener.close()
        self._workers.close()

    async def _answer(self, asked: Request) -> tuple[bytes, str, bool]:
        kind = (OPENMETRICS in asked.accept, asked.takes_gzip)
        async with self._turn:
            told = self._told.get(kind)
            if told is None or time.monotonic() - told[0] >= FRESH_S:
                told = self._told[kind] = await self._tell(*kind)
        return told[1], told[2], kind[1]

    async def _tell(self, openmetrics: bool, compress: bool) -> tuple[float, bytes, str]:
        taken = snapshot.take(self._sources, self.tally, self._seen_unix_s)
        reading = Reading(dict(self._listener.statuses), self._snapshot_s, self._render_s)
        text, content_type, took_s = await self._workers.run(self._render, taken, reading, openmetrics, compress)
        self._snapshot_s, self._render_s = taken.took_s, took_s
        return time.monotonic(), text, content_type

    def _render(self, taken: Snapshot, reading: Reading, openmetrics: bool, compress: bool) -> tuple[bytes, str, float]:
        """On the thread."""
        began_s = time.perf_counter()
        found = figures.of(taken, self._shelf.look(), reading)
        text, content_type = self._exposition.render(found, _OPENMETRICS_1 if openmetrics else "", compress=compress)
        return text, content_type, time.perf_counter() - began_s
