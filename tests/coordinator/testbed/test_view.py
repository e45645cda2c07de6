"""What is read out of a job's JSON while a run goes on."""

from __future__ import annotations

from typing import Any

from fleetune.coordinator.testbed import view


def _task(device: str, state: str = "assigned", stage: str = "training", **failure: str) -> dict[str, Any]:
    return {"device_name": device, "kind": "train", "state": state, "stage": stage, "online": True, "failure": failure or None}


def _round(number: int, *tasks: dict[str, Any], metrics: dict[str, float] | None = None) -> dict[str, Any]:
    facts = {"phase": "training", "started_unix_s": 10.0, "ended_unix_s": 14.5, "updates_folded": 1}
    return {"round": number, "tasks": list(tasks), "metrics": metrics or {}, **facts}


def _job(**facts: Any) -> dict[str, Any]:
    job = {
        "state": "running",
        "message": "",
        "rounds_total": 2,
        "rounds_committed": 0,
        "metric": "accuracy",
        "history": [],
        "current": None,
    }
    return {**job, **facts}


def test_only_open_tasks_have_a_stage() -> None:
    job = _job(current=_round(1, _task("a", stage="fetching_base"), _task("b", state="done"), _task("c", stage="unspecified")))
    assert view.stages(job) == {"a": "fetching base"}
    assert view.stages(_job()) == {}


def test_who_is_measured_beside_a_round_measures() -> None:
    job = _job(current=_round(1, _task("a")), newcomers=[_task("late", stage="measuring")])
    assert view.stages(job) == {"a": "training", "late": "measuring"}


def test_training_has_begun_with_the_first_task_and_not_before() -> None:
    assert not view.began(_job(state="preparing"))
    assert view.began(_job(current=_round(1, _task("a"))))
    assert view.began(_job(history=[_round(1)]))


def test_each_piece_of_news_is_told_once() -> None:
    news = view.News()
    failed = _task("a", state="failed", kind="out_of_memory", message="The child process was ended.")
    first = _job(current=_round(1, failed, _task("b")))
    assert news.lines(first) == ["job running", "round 1/2 begins: a, b", "round 1: a failed (out of memory): The child process was ended."]
    assert news.lines(first) == []
    ended = _job(state="completed", rounds_committed=1, history=[_round(1, failed, _task("b", state="done"), metrics={"accuracy": 0.5})])
    assert news.lines(ended) == ["round 1/2 done in 4.5 s, 1 of 2 devices, accuracy 0.500", "job completed"]


def test_between_rounds_it_is_the_last_round_that_counts() -> None:
    job = _job(rounds_committed=3)
    assert view.round_number(job) == 3
    assert view.phase(job) == "running"
    assert view.phase(_job(current=_round(4))) == "training"
