"""What `fleetune watch --json` says of a job, looked into: its state, what each device is at, what is new since the last look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

ENDED = ("completed", "failed", "cancelled")


def stages(job: Mapping[str, Any]) -> dict[str, str]:
    """Device -> what its open task is at; who is idle is absent."""
    tasks: Sequence[Mapping[str, Any]] = [*(job.get("newcomers") or []), *(_table(job.get("current")).get("tasks") or [])]
    return {task["device_name"]: str(task["stage"]).replace("_", " ") for task in tasks if _open(task)}


def round_number(job: Mapping[str, Any]) -> int:
    """The one under way, else the last."""
    return int(_table(job.get("current")).get("round") or job["rounds_committed"])


def began(job: Mapping[str, Any]) -> bool:
    """Whether devices have been told to train, now or before."""
    return bool(job["history"] or _table(job.get("current")).get("tasks"))


def phase(job: Mapping[str, Any]) -> str:
    """The round's, else the job's state."""
    current = _table(job.get("current"))
    return str(current["phase"]) if current.get("phase") and job["state"] == "running" else str(job["state"])


def accuracy(job: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The job's metric in words, or ""."""
    value = metrics.get(job["metric"])
    return f"{job['metric']} {value:.3f}" if isinstance(value, (int, float)) else ""


def problem(task: Mapping[str, Any]) -> str:
    """Why a device gave no result, with the kind of failure; "" where it did."""
    device, failure = str(task["device_name"]), _table(task.get("failure"))
    kind = str(failure.get("kind") or "").replace("_", " ")
    match task["state"]:
        case "failed":
            return f"{device} failed ({kind}): {failure.get('message') or kind}"
        case "refused":
            return f"{device} refused: {failure.get('message') or 'its owner does not let it train now'}"
        case "missed":
            return f"{device} missed the round: {failure.get('message') or ('not back in time' if task['online'] else 'it left')}"
        case "late":
            return f"{device} came late"
        case _:
            return ""


class News:
    """The lines that matter, each said once."""

    def __init__(self) -> None:
        self._committed = 0
        self._begun = 0
        self._state = ""
        self._message = ""
        self._problems: set[str] = set()

    def lines(self, job: Mapping[str, Any]) -> list[str]:
        """What is new since the last call."""
        said: list[str] = []
        total = job["rounds_total"]
        ended = job["state"] in ENDED
        if not ended:
            said += self._standing(job)
        for item in job["history"]:
            said += self._troubles(item)
            if item["round"] > self._committed:
                self._committed = item["round"]
                trained = [task for task in item["tasks"] if task["kind"] in ("train", "unspecified")]
                measured = accuracy(job, item["metrics"])
                seconds = item["ended_unix_s"] - item["started_unix_s"]
                folded = f"{item['updates_folded']} of {len(trained)} devices"
                said.append(f"round {item['round']}/{total} done in {seconds:.1f} s, {folded}" + (f", {measured}" if measured else ""))
        current = _table(job.get("current"))
        if job["state"] == "running" and current.get("tasks") and current["round"] > self._begun:
            self._begun = current["round"]
            names = ", ".join(sorted(task["device_name"] for task in current["tasks"]))
            said.append(f"round {current['round']}/{total} begins: {names}")
        if current:
            said += self._troubles(current)
        if ended:
            said += self._standing(job)
        return said

    def _standing(self, job: Mapping[str, Any]) -> list[str]:
        if (job["state"], job["message"]) == (self._state, self._message):
            return []
        self._state, self._message = job["state"], job["message"]
        return [f"job {job['state']}" + (f": {job['message']}" if job["message"] else "")]

    def _troubles(self, item: Mapping[str, Any]) -> list[str]:
        said: list[str] = []
        for task in item["tasks"]:
            text = problem(task)
            key = f"{item['round']} {text}"
            if text and key not in self._problems:
                self._problems.add(key)
                said.append(f"round {item['round']}: {text}")
        return said


def _open(task: Mapping[str, Any]) -> bool:
    return bool(task["state"] == "assigned" and task["stage"] != "unspecified")


def _table(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}
