"""Records of testbed runs as `fleetune testbed run` would write them: small ones by hand, and one that is played by a seeded die."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

START_UNIX_S = 1_700_000_000.0
MIB = 1 << 20

Line = dict[str, object]


def device(name: str, kind: str = "pi4", *, cpus: float = 0.5, memory_mib: int = 2048, up_mbit: float = 10, down_mbit: float = 40) -> Line:
    """A device of the testbed's file."""
    return {
        "name": name,
        "kind": kind,
        "cpus": cpus,
        "memory_mib": memory_mib,
        "up_mbit": up_mbit,
        "down_mbit": down_mbit,
        "latency_ms": 0.0,
        "disk_mib": 2048,
        "share": 1.0,
    }


def began(devices: Sequence[Line], *, chaos: Sequence[Line] = (), name: str = "kitchen") -> Line:
    """The first line."""
    spec = {
        "name": name,
        "seed": 7,
        "coordinator_cpus": 2.0,
        "coordinator_memory_mib": 2048,
        "split": "dirichlet",
        "alpha": 0.5,
        "devices": list(devices),
    }
    return {
        "what": "began",
        "at_unix_s": START_UNIX_S,
        "backend": "netns",
        "spec": spec,
        "chaos": list(chaos),
        "machine": {"cpus": 2, "memory_bytes": 8 << 30, "kernel": "6.1.0"},
        "job_id": "7f3a21c9",
        "job": '[job]\nname = "intents"\n',
    }


def sample(
    cpu_s: float | None = 0.0,
    sent_bytes: int | None = 0,
    *,
    received_bytes: int | None = 0,
    memory_bytes: int | None = 100 * MIB,
    peak_bytes: int | None = None,
    kills: int | None = 0,
    energy_j: float | None = None,
) -> Line:
    """Counters of one member."""
    return {
        "cpu_s": cpu_s,
        "memory_bytes": memory_bytes,
        "memory_peak_bytes": peak_bytes if peak_bytes is not None else memory_bytes,
        "sent_bytes": sent_bytes,
        "received_bytes": received_bytes,
        "out_of_memory_kills": kills,
        "energy_j": energy_j,
    }


def sampled(
    at_s: float,
    members: Mapping[str, Line] | None = None,
    *,
    stages: Mapping[str, str] | None = None,
    lives: Mapping[str, str] | None = None,
    round_number: int = 1,
    phase: str = "training",
) -> Line:
    """One look at all members; those without a life run."""
    known = dict(members or {})
    return {
        "what": "sampled",
        "at_unix_s": START_UNIX_S + at_s,
        "members": known,
        "lives": {**dict.fromkeys([*known, "coordinator"], "running"), **(lives or {})},
        "stages": dict(stages or {}),
        "round_number": round_number,
        "phase": phase,
    }


def acted(at_s: float, member: str, act: str, text: str = "") -> Line:
    """A fault made or undone."""
    return {"what": "acted", "at_unix_s": START_UNIX_S + at_s, "member": member, "act": act, "text": text}


def task(name: str, state: str = "done", *, samples: int = 100, kind: str = "train", failure: Line | None = None) -> Line:
    """One device's part of a round, as `--json` tells it."""
    none = {"kind": "unspecified", "stage": "", "message": "", "traceback": ""}
    return {"device_name": name, "kind": kind, "state": state, "samples": samples, "failure": failure or none, "plan": None}


def out_of_memory(message: str = "The kernel ended the training child.") -> Line:
    """A failure."""
    return {"kind": "out_of_memory", "stage": "train", "message": message, "traceback": ""}


def committed(
    number: int,
    begin_s: float,
    end_s: float,
    metrics: Mapping[str, float],
    tasks: Sequence[Line],
    *,
    upload_bytes: int = MIB,
    late: int = 0,
) -> Line:
    """A committed round of the job's report."""
    return {
        "round": number,
        "phase": "committed",
        "tasks": list(tasks),
        "started_unix_s": START_UNIX_S + begin_s,
        "ended_unix_s": START_UNIX_S + end_s,
        "metrics": dict(metrics),
        "upload_bytes": upload_bytes,
        "download_bytes": upload_bytes,
        "updates_folded": sum(item["state"] == "done" for item in tasks),
        "updates_late": late,
        "plan": None,
    }


def job_report(
    history: Sequence[Line],
    *,
    state: str = "completed",
    rounds_total: int | None = None,
    initial: Mapping[str, float] | None = None,
    metric: str = "accuracy",
    deadline_s: float = 0.0,
    message: str = "",
    current: Line | None = None,
    failure: Line | None = None,
    failed_device: str = "",
) -> Line:
    """What `fleetune report --json` says, as far as a testbed's report reads it."""
    shares: dict[str, dict[str, float]] = {}
    failures: list[Line] = []
    for item in history:
        for one in _tasks(item):
            name, state_ = str(one["device_name"]), str(one["state"])
            share = shares.setdefault(name, dict.fromkeys(("asked", "done", "samples", "failed", "missed", "late", "refused"), 0.0))
            share["asked"] += 1
            share[state_] += 1
            if state_ == "done":
                share["samples"] += float(str(one["samples"]))
            else:
                failures.append({"round": item["round"], "device": name, "state": state_, **cast("Line", one["failure"])})
    total = sum(share["samples"] for share in shares.values()) or 1.0
    devices: list[Line] = [
        {
            "device": name,
            "rounds_asked": share["asked"],
            "rounds_done": share["done"],
            "samples": share["samples"],
            "share": share["samples"] / total,
            **{word: share[word] for word in ("failed", "missed", "late", "refused")},
        }
        for name, share in shares.items()
    ]
    return {
        "job_id": "7f3a21c9",
        "name": "intents",
        "state": state,
        "message": message,
        "method": "fedavg_lora",
        "base": "all-MiniLM-L6-v2",
        "metric": metric,
        "rounds_total": len(history) if rounds_total is None else rounds_total,
        "rounds_committed": len(history),
        "best_round": len(history),
        "initial_metrics": dict(initial or {}),
        "history": list(history),
        "current": current,
        "upload_bytes": sum(int(str(item["upload_bytes"])) for item in history),
        "failure": failure,
        "failed_device": failed_device,
        "job_toml": f"[rounds]\ndeadline_s = {deadline_s}\n",
        "tasks_since_round": 0,
        "devices": devices,
        "failures": failures,
    }


def _tasks(item: Line) -> list[Line]:
    return cast("list[Line]", item["tasks"])


def ended(at_s: float, report: Line, *, devices: Sequence[str] = (), status: str | None = None, notes: Sequence[str] = ()) -> Line:
    """The job's end."""
    views = [{"name": name, "online": True, "failures": 0, "last_failure": ""} for name in devices]
    return {
        "what": "ended",
        "at_unix_s": START_UNIX_S + at_s,
        "status": status or str(report.get("state", "")),
        "report": report,
        "devices": views,
        "history": [],
        "notes": list(notes),
    }


def checked(at_s: float, violations: Sequence[Line] = ()) -> Line:
    """The history checker's word."""
    return {"what": "checked", "at_unix_s": START_UNIX_S + at_s, "history": list(violations)}


def text(lines: Sequence[Line]) -> bytes:
    """The lines as a file holds them."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "surrogatepass")


def write(folder: Path, lines: Sequence[Line]) -> Path:
    """The lines as a file."""
    path = folder / "run.jsonl"
    path.write_bytes(text(lines))
    return path


# --- a played run


@dataclass
class _Board:
    name: str
    kind: str
    speed: float
    spec: Line
    stage: str = ""
    left_s: float = 0.0
    queue: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    life: str = "running"
    cpu_s: float = 4.0
    sent: int = 20_000
    received: int = 30_000
    memory: int = 90 * MIB
    peak: int = 90 * MIB
    kills: int = 0
    loaded: bool = False


_KINDS = {"pi4": (0.5, 2048, 10, 40), "pi5": (1.0, 4096, 20, 80), "orin-nano": (1.5, 4096, 50, 200), "laptop": (2.0, 8192, 100, 500)}


def played(names: Mapping[str, str], *, rounds: int = 6, seed: int = 7, small: str = "") -> list[Line]:
    """A run of `names` (device -> kind) with faults of every sort, second by second. The device called `small` runs out of memory twice."""
    die = random.Random(seed)
    boards: list[_Board] = []
    for name, kind in names.items():
        cpus, memory, up, down = _KINDS[kind]
        memory = 512 if name == small else memory
        boards.append(_Board(name, kind, cpus, device(name, kind, cpus=cpus, memory_mib=memory, up_mbit=up, down_mbit=down)))
    lines = [began([board.spec for board in boards])]
    history: list[Line] = []
    targets = [board.name for board in boards if board.name != small]
    plan = _schedule(targets, die, rounds)
    now, coordinator_cpu, cut = 3.0, 2.0, set[str]()
    for second in range(3):
        lines.append(_look(second, boards, 0, "preparing", coordinator_cpu))
    for number in range(1, rounds + 1):
        start = now
        for board in boards:
            load = 0.0 if board.loaded else 5.0 / board.speed
            board.loaded = True
            board.queue = [("fetching state", 1.0), ("loading", load), ("training", die.uniform(4, 6) / board.speed), ("uploading", 1.5)]
            if number == 1:
                board.queue.insert(0, ("fetching base", 8.0 / board.speed))
            if board.name == small and number > 2:
                board.queue = []
        done: set[str] = set()
        phase = "training"
        while now - start < 60:
            for at_s, member, act, words in [item for item in plan if item[0] < now + 1]:
                plan.remove((at_s, member, act, words))
                lines.append(acted(max(at_s, now), member, act, words))
                _apply(act, next((board for board in boards if board.name == member), None), cut)
            for board in boards:
                _tick(board, board.name in cut, die, small == board.name)
            coordinator_cpu += 0.2
            lines.append(_look(now, boards, number, phase, coordinator_cpu))
            now += 1.0
            if all(not board.queue and not board.stage for board in boards):
                break
        for board in boards:
            ended_well = not board.queue and not board.stage
            board.stage, board.queue, board.left_s = "", [], 0.0
            if ended_well:
                done.add(board.name)
        for name, seconds in (("folding", 1), ("evaluating", 3)):
            for _ in range(seconds):
                for board in boards:
                    board.stage = "evaluating" if name == "evaluating" and board.life == "running" and board.name != small else ""
                    board.cpu_s += 0.3 * board.speed if board.stage else 0.02
                lines.append(_look(now, boards, number, name, coordinator_cpu))
                now += 1.0
        for board in boards:
            board.stage = ""
        tasks: list[Line] = []
        for board in boards:
            if board.name == small:
                if number <= 2:
                    tasks.append(task(board.name, "failed", samples=0, failure=out_of_memory()))
                continue
            tasks.append(task(board.name, "done" if board.name in done else "missed", samples=die.randint(80, 400)))
        accuracy = round(0.94 - 0.85 * 0.6**number + die.uniform(-0.01, 0.01), 4)
        history.append(committed(number, start, now, {"loss": 1.2 / number, "accuracy": accuracy}, tasks, upload_bytes=len(done) * 300_000))
        now += 0.5
    lines.sort(key=lambda line: float(str(line["at_unix_s"])))
    report = job_report(history, initial={"loss": 2.5, "accuracy": 0.081}, deadline_s=45.0)
    lines.append(ended(now, report, devices=[board.name for board in boards]))
    lines.append(checked(now + 4))
    return lines


def _schedule(targets: Sequence[str], die: random.Random, rounds: int) -> list[tuple[float, str, str, str]]:
    kinds = [
        ("kill", "restart", 6.0, "killed with SIGKILL"),
        ("pause", "resume", 9.0, "all processes frozen"),
        ("cut", "mend", 8.0, "link cut"),
        ("throttle", "unthrottle", 14.0, "link throttled to 0.5 Mbit/s"),
        ("fill_disk", "free_disk", 10.0, "disk filled, 0 bytes free"),
        ("out_of_memory", "", 0.0, "took memory until the kernel killed the training child"),
    ]
    plan: list[tuple[float, str, str, str]] = []
    for index in range(max(len(kinds), len(targets) // 3)):
        act, undo, for_s, words = kinds[index % len(kinds)]
        member = targets[index % len(targets)]
        at_s = round(20.0 + index * rounds * 20.0 / max(len(kinds), len(targets) // 3) + die.uniform(0, 6), 2)
        plan.append((at_s, member, act, words))
        if undo:
            plan.append((at_s + for_s, member, undo, "undone"))
    return sorted(plan)


def _apply(act: str, board: _Board | None, cut: set[str]) -> None:
    if board is None:
        return
    if act == "kill":
        board.life, board.loaded = "ended", False
        if board.stage or board.queue:
            board.queue, board.stage = [("loading", 5.0 / board.speed), ("training", 5.0 / board.speed), ("uploading", 1.5)], ""
    elif act in ("restart", "resume"):
        board.life = "running"
    elif act == "pause":
        board.life = "paused"
    elif act == "cut":
        cut.add(board.name)
    elif act == "mend":
        cut.discard(board.name)
    elif act == "out_of_memory":
        board.kills += 1
        board.peak = int(str(board.spec["memory_mib"])) * MIB


def _tick(board: _Board, cut: bool, die: random.Random, small: bool) -> None:
    if board.life != "running":
        return
    board.cpu_s += 0.02
    if not board.stage and board.queue:
        board.stage, board.left_s = board.queue.pop(0)
    if not board.stage:
        board.memory = 90 * MIB
        return
    if board.stage in ("uploading", "fetching state", "fetching base") and cut:
        return
    if board.stage == "training":
        board.cpu_s += board.speed * die.uniform(0.9, 1.0)
        board.memory = 700 * MIB
        if small and board.left_s < 6:
            board.kills += 1
            board.stage, board.queue = "", []
            return
    elif board.stage == "uploading":
        board.sent += 200_000
    elif board.stage.startswith("fetching"):
        board.received += 4_000_000 if board.stage == "fetching base" else 300_000
    else:
        board.cpu_s += 0.4 * board.speed
    board.peak = max(board.peak, board.memory)
    board.left_s -= 1.0
    if board.left_s <= 0:
        board.stage = ""
        if board.queue:
            board.stage, board.left_s = board.queue.pop(0)


def _look(at_s: float, boards: Sequence[_Board], round_number: int, phase: str, coordinator_cpu: float) -> Line:
    members = {
        board.name: sample(
            board.cpu_s, board.sent, received_bytes=board.received, memory_bytes=board.memory, peak_bytes=board.peak, kills=board.kills
        )
        for board in boards
    }
    members["coordinator"] = sample(coordinator_cpu, 900_000, received_bytes=800_000, memory_bytes=300 * MIB)
    stages = {board.name: board.stage for board in boards if board.stage and board.life == "running"}
    lives = {board.name: board.life for board in boards}
    return sampled(at_s, members, stages=stages, lives=lives, round_number=round_number, phase=phase)
