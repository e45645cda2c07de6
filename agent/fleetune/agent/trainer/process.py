"""The training child from the daemon's side: started early, kept warm for a while, ended when told or when memory is short."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from fleetune.child.process import ChildDied, ChildError, ChildProcess, OnEvent

LOG = logging.getLogger(__name__)

MODULE = "fleetune.agent.trainer"


class Trainer:
    """One child, one request at a time. Owner of the process and of the timer that ends it when nothing follows."""

    def __init__(self, environment: Mapping[str, str], module: str = MODULE) -> None:
        self._child = ChildProcess(module, environment=environment)
        self._starting: asyncio.Task[None] | None = None
        self._cooling: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._busy = False
        self.accelerator = ""
        """What the child saw of accelerators, once it has looked."""

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def busy(self) -> bool:
        return self._busy

    def prepare(self, *, with_torch: bool) -> None:
        """Begin to start the child, so that it is up when the state has arrived; `with_torch` lets it import that as well.

        Safe to call at any time; does nothing where a child is up.
        """
        self._keep()
        if not self._child.alive and self._starting is None and self._stopping is None:
            self._starting = asyncio.create_task(self._start(with_torch), name="training child start")

    async def request(
        self, op: str, fields: Mapping[str, object], on_event: OnEvent, on_stderr: Callable[[str], None]
    ) -> dict[str, object]:
        """Ask the child. ChildError for its answer, ChildDied for its end; cancelling ends it."""
        self._busy = True
        try:
            await self._settle()
            self._keep()
            self._child.on_stderr = on_stderr
            return await self._child.request(op, fields, on_event)
        finally:
            self._child.on_stderr = None
            self._busy = False

    def rest(self, keep_warm_s: float) -> None:
        """Nothing to do now: end the child after `keep_warm_s` unless something follows."""
        self._keep()
        self._cooling = asyncio.get_running_loop().call_later(max(0.0, keep_warm_s), self._cool)

    def relieve(self) -> None:
        """Memory is short: end a child that only waits."""
        if not self._busy and self._cooling is not None:
            self._keep()
            self._cool()

    async def stop(self) -> None:
        """End the child now. Safe to call twice."""
        self._keep()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
            self._starting = None
        await self._settle()
        await self._child.stop()

    async def _start(self, with_torch: bool) -> None:
        await self._child.start()
        if not with_torch:
            return
        try:
            answer = await self._child.request("ping", {"probe": True})
        except (ChildError, ChildDied) as error:
            # The task that follows meets the same trouble and reports it with its stage.
            LOG.debug("training child could not prepare cause=%r", str(error))
        else:
            self.accelerator = str(answer.get("accelerator") or "")

    def _keep(self) -> None:
        if self._cooling is not None:
            self._cooling.cancel()
            self._cooling = None

    def _cool(self) -> None:
        self._cooling = None
        if self._child.alive and not self._busy and self._stopping is None:
            LOG.debug("training child is ended, nothing to do pid=%s", self._child.pid)
            self._stopping = asyncio.create_task(self._child.stop(), name="training child stop")
            self._stopping.add_done_callback(self._cooled)

    def _cooled(self, task: asyncio.Task[None]) -> None:
        if self._stopping is task:
            self._stopping = None

    async def _settle(self) -> None:
        """Wait for a start or stop under way: the child has one owner at a time."""
        try:
            for task in (self._starting, self._stopping):
                if task is not None:
                    await asyncio.shield(task)
        finally:
            # Whoever is cancelled here leaves the start to the next one, who must not ask the child before its first answer is read.
            if self._starting is not None and self._starting.done():
                self._starting = None
