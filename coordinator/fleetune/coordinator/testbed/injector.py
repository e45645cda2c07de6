"""Does the acts of a schedule to a running testbed, and undoes what is open when told to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from fleetune.coordinator.testbed.backend import Backend
from fleetune.coordinator.testbed.record import Acted
from fleetune.coordinator.testbed.schedule import UNDONE, Act, Verb
from fleetune.coordinator.testbed.spec import TestbedSpec
from fleetune.errors import FleetuneError
from fleetune.workers import Workers

THREADS = 8


class Injector:
    """One run's faults. `heard` is told of each act when it is done, on the event loop."""

    def __init__(self, backend: Backend, spec: TestbedSpec, acts: Sequence[Act], heard: Callable[[Acted], None]) -> None:
        self._backend = backend
        self._spec = spec
        self._acts = tuple(acts)
        self._heard = heard
        self._workers = Workers("faults", THREADS)
        self._turns = {act.member: asyncio.Lock() for act in acts}
        self._open: dict[str, Verb] = {}
        self.notes: list[str] = []
        """Acts that this machine could not do, in words."""

    async def run(self) -> None:
        """Until the last act is done. Times count from the call."""
        begun_s = time.monotonic()
        doing: list[asyncio.Task[None]] = []
        try:
            for act in self._acts:
                await asyncio.sleep(max(0.0, begun_s + act.at_s - time.monotonic()))
                # Several at once: a member that dies slowly must not delay another's end.
                doing.append(asyncio.ensure_future(self._do(act)))
            await asyncio.gather(*doing)
        finally:
            for task in doing:
                task.cancel()

    async def undo(self) -> None:
        """Ends every open fault."""
        await asyncio.gather(*(self._do(Act(0.0, member, verb)) for member, verb in list(self._open.items())))

    def close(self) -> None:
        self._workers.close()

    async def _do(self, act: Act) -> None:
        async with self._turns.setdefault(act.member, asyncio.Lock()):
            if act.verb in UNDONE.values() and self._open.get(act.member) != act.verb:
                return  # undone already
            undone = _undone(act.verb)
            if undone is not None:
                # Before the act: one that was cut off half way is undone as well.
                self._open[act.member] = undone
            else:
                self._open.pop(act.member, None)
            doing = self._workers.run(_act, self._backend, self._spec, act)
            try:
                await asyncio.wait({doing})
            except asyncio.CancelledError:
                # Undoing it while it is still being done would leave it done. Each act is bounded in time.
                while not doing.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait({doing})
                raise
            finally:
                self._tell(act, doing)

    def _tell(self, act: Act, done: asyncio.Future[str]) -> None:
        error = done.exception()
        if error is not None and not isinstance(error, FleetuneError):
            raise error
        text = done.result() if error is None else f"could not be done: {error}"
        if error is not None:
            self.notes.append(f"{act.member}: {act.verb} {text}")
        self._heard(Acted(time.time(), act.member, act.verb, text))


def _undone(verb: Verb) -> Verb | None:
    return next((undone for kind, undone in UNDONE.items() if kind == verb), None)


def _act(backend: Backend, spec: TestbedSpec, act: Act) -> str:
    """Does it; what was done, in words."""
    member = act.member
    match act.verb:
        case "kill":
            backend.kill(member)
            return "all its processes killed"
        case "restart":
            backend.restart(member)
            return "started again"
        case "pause":
            backend.pause(member)
            return "frozen; its kernel still answers"
        case "resume":
            backend.resume(member)
            return "thawed"
        case "cut":
            backend.cut(member)
            return "link cut"
        case "mend":
            backend.mend(member)
            return "link mended"
        case "throttle":
            device, to_mbit = spec.device(member), act.to_mbit or 1.0
            up, down = min(device.up_mbit, to_mbit), min(device.down_mbit, to_mbit)
            backend.throttle(member, up, down)
            return f"link held to {up:g} Mbit/s up and {down:g} down (was {device.up_mbit:g} and {device.down_mbit:g})"
        case "unthrottle":
            device = spec.device(member)
            backend.throttle(member, None, None)
            return f"link back at {device.up_mbit:g} Mbit/s up and {device.down_mbit:g} down"
        case "fill_disk":
            backend.fill_disk(member)
            return f"no byte free on its disk of {spec.device(member).disk_mib} MiB"
        case "free_disk":
            backend.free_disk(member)
            return "disk free again"
        case "out_of_memory":
            backend.exhaust_memory(member)
            limit = spec.device(member).memory_mib if member in spec.names else spec.coordinator_memory_mib
            return f"its {limit} MiB taken by another program until the kernel killed one of its processes"
