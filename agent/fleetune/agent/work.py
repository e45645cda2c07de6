"""What to do next: the agent's tasks as a pure state machine, events in, commands out.

One task runs at a time; further ones queue. A result is kept until its receipt, whatever happens to the connection. Everything
may arrive twice: a task is known by task_id and lease, a receipt by task_id and the lease under which its result was sent.

All of this holds within an epoch. A coordinator that an operator has restored from a backup hands out task ids again, for other work: a
task of another epoch takes the place of what is held under its id, and no result is carried over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fleetune.agent.domain import Evaluated, Failed, FailureKind, Measured, Receipt, Refused, Result, Task, Update

QUEUE_TASKS_MAX = 8
"""More tasks than this at once is a mistake of the coordinator; they are refused, not hoarded."""

RECENT_MAX = 128
"""Ended tasks remembered, so that one that is repeated late isn't run again."""


@dataclass(frozen=True)
class Running:
    task: Task
    # Cancelled: its end is awaited, its result dropped.
    stopping: bool = False


@dataclass(frozen=True)
class Kept:
    """A result that waits for its receipt. A receipt for any lease from `first_lease` on is for this result."""

    result: Result
    first_lease: int


@dataclass(frozen=True)
class State:
    methods: frozenset[str]
    accepts: bool = True
    reason: str = ""
    queue: tuple[Task, ...] = ()
    running: Running | None = None
    kept: tuple[Kept, ...] = ()
    # (task_id, epoch, lease) of ended tasks, newest last.
    recent: tuple[tuple[str, int, int], ...] = ()

    def unfinished(self) -> tuple[Task, ...]:
        """Tasks that run or wait to, but not one that is being stopped."""
        running = (self.running.task,) if self.running is not None and not self.running.stopping else ()
        return running + self.queue


# --- events


@dataclass(frozen=True)
class Recovered:
    """Results found in the outbox at start."""

    results: tuple[Result, ...]


@dataclass(frozen=True)
class Connected:
    """A session was opened."""


@dataclass(frozen=True)
class Received:
    task: Task


@dataclass(frozen=True)
class Unusable:
    """A task came that cannot even be read."""

    task_id: str
    lease: int
    message: str


@dataclass(frozen=True)
class CancelAsked:
    task_id: str


@dataclass(frozen=True)
class Ended:
    """The running task ended; None where it was stopped before it had a result."""

    task_id: str
    result: Result | None


@dataclass(frozen=True)
class Receipted:
    receipt: Receipt


@dataclass(frozen=True)
class Undeliverable:
    """An update that can never be sent: its file is damaged, or the coordinator refuses the stream itself."""

    task_id: str
    lease: int
    kind: FailureKind
    message: str


@dataclass(frozen=True)
class AvailabilityChanged:
    accepts: bool
    reason: str


Event = Recovered | Connected | Received | Unusable | CancelAsked | Ended | Receipted | Undeliverable | AvailabilityChanged

# --- commands


@dataclass(frozen=True)
class Start:
    task: Task


@dataclass(frozen=True)
class Stop:
    """End the running task's transfers and child; Ended follows."""

    task_id: str


@dataclass(frozen=True)
class Deliver:
    """Record a fresh result, then send it; or send a recorded one again."""

    result: Result
    fresh: bool


@dataclass(frozen=True)
class Forget:
    """Stop sending and delete the result and its file."""

    result: Result


Command = Start | Stop | Deliver | Forget
Step = tuple[State, tuple[Command, ...]]


def step(state: State, event: Event) -> Step:
    """The state after `event`, and what to do, in order. Pure."""
    if isinstance(event, Received):
        return _received(state, event.task)
    if isinstance(event, Unusable):
        if any(task_id == event.task_id for task_id in known_ids(state)):
            return state, ()
        return _keep(state, Failed(event.task_id, event.lease, 0, FailureKind.UNSUPPORTED, "load", event.message))
    if isinstance(event, CancelAsked):
        return _cancelled(state, event.task_id)
    if isinstance(event, Ended):
        return _ended(state, event)
    if isinstance(event, Receipted):
        return _receipted(state, event.receipt)
    if isinstance(event, Undeliverable):
        return _undeliverable(state, event)
    if isinstance(event, AvailabilityChanged):
        return _availability(state, event)
    if isinstance(event, Connected):
        # Uploads go on by themselves over their own connection; outcomes went down with the old stream, so all are sent again.
        return state, tuple(Deliver(kept.result, fresh=False) for kept in state.kept)
    kept = tuple(Kept(result, result.lease) for result in event.results)
    return replace(state, kept=state.kept + kept), ()


def violations(state: State) -> list[str]:
    """What must never be, for tests and for a log line; empty when all is well."""
    found: list[str] = []
    ids = known_ids(state)
    if len(ids) != len(set(ids)):
        found.append(f"a task stands in two places: {sorted(ids)}")
    if state.queue and state.running is None:
        found.append("tasks wait although nothing runs")
    if len(state.queue) > QUEUE_TASKS_MAX:
        found.append(f"{len(state.queue)} tasks wait, allowed are {QUEUE_TASKS_MAX}")
    if len(state.recent) > RECENT_MAX:
        found.append(f"{len(state.recent)} ended tasks are remembered, allowed are {RECENT_MAX}")
    if any(kept.first_lease > kept.result.lease for kept in state.kept):
        found.append("a result stands under an older lease than its first")
    return found


def known_ids(state: State) -> list[str]:
    """Of tasks that run, wait or have a result that waits for its receipt."""
    return [task.task_id for task in state.unfinished()] + [kept.result.task_id for kept in state.kept]


def _received(state: State, task: Task) -> Step:
    if any((task_id, epoch) == (task.task_id, task.epoch) and lease >= task.lease for task_id, epoch, lease in state.recent):
        return state, ()
    if any(epoch != task.epoch for epoch in _epochs(state, task.task_id)):
        # Of before the restore, or the same id could not be told apart. Its result would be refused.
        state, ended = _cancelled(state, task.task_id)
        state, begun = _received(state, task)
        return state, ended + begun

    running = state.running
    if running is not None and not running.stopping and running.task.task_id == task.task_id:
        return replace(state, running=Running(_newer(running.task, task))), ()

    for index, waiting in enumerate(state.queue):
        if waiting.task_id == task.task_id:
            queue = (*state.queue[:index], _newer(waiting, task), *state.queue[index + 1 :])
            return replace(state, queue=queue), ()

    dropped: tuple[Command, ...] = ()
    for kept in state.kept:
        if kept.result.task_id != task.task_id:
            continue
        if kept.result.lease >= task.lease:
            # The coordinator repeats what it did not see the end of: so does the agent.
            return state, (Deliver(kept.result, fresh=False),)
        if isinstance(kept.result, (Update, Evaluated, Measured)):
            adopted = replace(kept.result, lease=task.lease)
            changed = tuple(replace(other, result=adopted) if other is kept else other for other in state.kept)
            return replace(state, kept=changed), (Deliver(adopted, fresh=False),)
        # A failure or refusal under an older lease: the coordinator wants another try.
        state = replace(state, kept=tuple(other for other in state.kept if other is not kept))
        dropped = (Forget(kept.result),)

    state, commands = _admit(state, task)
    return state, dropped + commands


def _admit(state: State, task: Task) -> Step:
    if not state.accepts:
        return _keep(state, Refused(task.task_id, task.lease, task.epoch, state.reason or "the device takes no tasks now"))
    if task.method not in state.methods:
        known = ", ".join(sorted(state.methods))
        message = f"this agent has no method {task.method!r}; it has: {known}. Update the agent."
        return _keep(state, Failed(task.task_id, task.lease, task.epoch, FailureKind.UNSUPPORTED, "load", message))
    if len(state.queue) >= QUEUE_TASKS_MAX:
        reason = f"{len(state.queue)} tasks wait on this device already, allowed are {QUEUE_TASKS_MAX}"
        return _keep(state, Refused(task.task_id, task.lease, task.epoch, reason))
    return _advance(replace(state, queue=(*state.queue, task)))


def _cancelled(state: State, task_id: str) -> Step:
    running = state.running
    if running is not None and running.task.task_id == task_id and not running.stopping:
        state = _remember(replace(state, running=replace(running, stopping=True)), running.task)
        return state, (Stop(task_id),)
    for task in state.queue:
        if task.task_id == task_id:
            state = replace(state, queue=tuple(other for other in state.queue if other is not task))
            return _remember(state, task), ()
    for kept in state.kept:
        if kept.result.task_id == task_id:
            return _forget(state, kept)
    return state, ()


def _ended(state: State, event: Ended) -> Step:
    running = state.running
    if running is None or running.task.task_id != event.task_id:
        return state, ()
    state = replace(state, running=None)
    result = event.result
    commands: tuple[Command, ...] = ()
    if result is not None and running.stopping:
        commands = (Forget(result),)
    elif result is not None:
        # The lease may have been renewed while the task ran.
        result = replace(result, lease=running.task.lease)
        state, commands = _keep(state, result)
    state, more = _advance(state)
    return state, commands + more


def _receipted(state: State, receipt: Receipt) -> Step:
    for kept in state.kept:
        if kept.result.task_id == receipt.task_id and receipt.lease >= kept.first_lease:
            return _forget(state, kept)
    return state, ()


def _undeliverable(state: State, event: Undeliverable) -> Step:
    for kept in state.kept:
        if kept.result.task_id == event.task_id and event.lease >= kept.first_lease and isinstance(kept.result, Update):
            failed = Failed(event.task_id, kept.result.lease, kept.result.epoch, event.kind, "upload", event.message)
            changed = tuple(Kept(failed, other.first_lease) if other is kept else other for other in state.kept)
            return replace(state, kept=changed), (Forget(kept.result), Deliver(failed, fresh=True))
    return state, ()


def _availability(state: State, event: AvailabilityChanged) -> Step:
    state = replace(state, accepts=event.accepts, reason=event.reason)
    commands: tuple[Command, ...] = ()
    if not event.accepts:
        # What runs goes on: its owner's wish not to be disturbed is better served by an end soon than by the same work twice.
        waiting, state = state.queue, replace(state, queue=())
        for task in waiting:
            state, more = _keep(state, Refused(task.task_id, task.lease, task.epoch, event.reason))
            commands += more
    return state, commands


def _advance(state: State) -> Step:
    if state.running is not None or not state.queue:
        return state, ()
    task, *rest = state.queue
    return replace(state, running=Running(task), queue=tuple(rest)), (Start(task),)


def _keep(state: State, result: Result) -> Step:
    return replace(state, kept=(*state.kept, Kept(result, result.lease))), (Deliver(result, fresh=True),)


def _forget(state: State, kept: Kept) -> Step:
    state = replace(state, kept=tuple(other for other in state.kept if other is not kept))
    return _remember(state, kept.result), (Forget(kept.result),)


def _remember(state: State, ended: Task | Result) -> State:
    return replace(state, recent=(*state.recent, (ended.task_id, ended.epoch, ended.lease))[-RECENT_MAX:])


def _epochs(state: State, task_id: str) -> list[int]:
    """Of whatever is held under this id."""
    held = [*state.unfinished(), *(kept.result for kept in state.kept)]
    return [one.epoch for one in held if one.task_id == task_id]


def _newer(held: Task, received: Task) -> Task:
    return received if received.lease > held.lease else held
