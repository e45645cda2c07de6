"""What is a device's own: its name, its id, its tasks with their leases, and the blobs of those. Pure.

Who calls comes from the certificate, what it asks for from the message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fleetune.coordinator.principal import Principal
from fleetune.coordinator.rounds.job import LiveJob

UPDATE_HEADER_BYTES_MAX = 1 << 21


def device_of(task_id: str) -> str:
    """The device that a task's id names ("<job>/<round>/<device>/<kind>[/<attempt>]"); empty for anything else."""
    parts = task_id.split("/", 5)
    return parts[2] if len(parts) in (4, 5) else ""


def own_id(caller: Principal, names: Mapping[str, str]) -> str:
    """The device id of an agent: its certificate's, or else the one that its name has in the fleet (`names`: name -> id); else empty."""
    return caller.device_id or names.get(caller.name, "")


def greeting_objection(caller: Principal, name: str, device_id: str, names: Mapping[str, str]) -> str:
    """Why `caller` may not greet as `name` with `device_id`, or an empty string.

    A certificate that names no id binds its name to the first id that comes with it; an id that another name has is not free for that.
    """
    if caller.kind == "local":
        return ""
    if name != caller.name:
        return f"the certificate is of {caller.name!r}, the agent calls itself {name!r}"
    own = own_id(caller, names)
    if own and device_id != own:
        return f"the id of {name!r} is another than the one in the agent's id file"
    if not own and device_id in names.values():
        return "the id in the agent's id file is another device's"
    return ""


def task_objection(caller: Principal, device_id: str, task_id: str, names: Mapping[str, str]) -> str:
    """Why `caller` may not deliver to `task_id` as `device_id`, or an empty string."""
    if caller.kind == "local":
        return ""
    own = own_id(caller, names)
    if not own or device_id != own:
        return "the device id is not its own"
    if device_of(task_id) not in ("", own):
        return "the task is another device's"
    return ""


def lease_objection(job: LiveJob | None, task_id: str, lease: int) -> str:
    """Why nobody can hold `lease` of this task, or an empty string. An older one than the present is sound: its result counts once."""
    if job is None:
        return ""
    entry = job.machine.open_task(task_id)
    # Of a round that is over: leases are counted over the whole job.
    newest = entry.lease if entry is not None else job.machine.lease
    return f"lease {lease} was never given out, the newest is {newest}" if lease > newest else ""


def may_fetch(jobs: Iterable[LiveJob], device_id: str, digest: str) -> bool:
    """Whether an open task of the device refers to this blob: the state that it starts from, or a file of its job's base."""
    for job in jobs:
        entry, prepared = job.machine.round, job.machine.prepared
        of_base = not job.ended and prepared is not None and any(digest == of_file for _, of_file, _ in prepared.files)
        if of_base and any(task.device_id == device_id for task in job.machine.newcomers.values()):
            return True
        if entry is None or job.ended:
            continue
        kinds = {
            kind
            for kind, state in (("train", entry.start_state), ("measure", entry.start_state), ("evaluate", entry.state))
            if of_base or (state is not None and state.digest == digest)
        }
        # Last, since it looks at every device of the round: nearly all that do not match are sorted out above.
        if kinds and any(t.device_id == device_id and t.status == "assigned" and t.kind in kinds for t in entry.tasks.values()):
            return True
    return False


def is_adapter(jobs: Iterable[LiveJob], digest: str) -> bool:
    """Whether the blob is an adapter, which every operator may see. Updates of single devices and optimizer states are none."""
    for job in jobs:
        states = (job.machine.state, *(entry.published for entry in job.history))
        if any(state is not None and state.digest == digest for state in states):
            return True
    return False


def update_bytes_max(job: LiveJob | None) -> int | None:
    """The most that an update of this job can take: each value of the state once, at twice its width, and the header."""
    state = job.machine.state if job is not None else None
    return None if state is None else 2 * state.size_bytes + UPDATE_HEADER_BYTES_MAX
