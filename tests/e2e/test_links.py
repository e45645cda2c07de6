"""Links that die, hold and flap, and devices that stand still: the fleet goes on without them, and they come back by themselves."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from fleetune.coordinator.history import reader
from fleetune.v1 import control_pb2
from support.fleet import Agent, Fleet, JobView, task_of, toml
from support.link import Link

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

BRISK = ("--heartbeat-s", "0.5", "--lease-s", "5")

DONE = control_pb2.DEVICE_TASK_STATE_DONE
ASSIGNED = control_pb2.DEVICE_TASK_STATE_ASSIGNED
MISSED = control_pb2.DEVICE_TASK_STATE_MISSED

FLAPS = 20
STANDSTILLS = 3
WAIT_S = 5.0
WAITING_CPU_SHARE_MAX = 0.05


def echo_job(count: int, mib: float = 0.1, **rounds: object) -> str:
    """Rounds of moments with both devices."""
    tables: dict[str, Mapping[str, object]] = {"method": {"name": "echo", "state_mib": mib}, "rounds": {"count": count, **rounds}}
    return toml({"name": "links", **tables, "devices": {"minimum": 2}})


def linked(link: Link, name: str) -> Agent:
    """A device behind the link: the last word about the coordinator's address counts."""
    return Agent(options=("--coordinator", link.address), tags=(name,))


def states(view: JobView) -> dict[str, int]:
    return {task.device_name: task.state for task in view.current.tasks}


def kept_results(fleet: Fleet, name: str) -> int:
    """In an agent's outbox."""
    with closing(sqlite3.connect(fleet.state_of(name) / "outbox" / "outbox.sqlite")) as raw:
        return int(raw.execute("SELECT count(*) FROM results").fetchone()[0])


def test_a_device_behind_a_dead_link_is_left_behind_keeps_its_result_and_takes_part_again(tmp_path: Path) -> None:
    with Link() as link, Fleet(tmp_path, {"a": Agent(), "b": linked(link, "b")}, coordinator=BRISK, start_agents=False) as fleet:
        link.lead(fleet.address)
        fleet.start("a")
        fleet.start("b")
        # What it sends to measure its link is not to be taken for its upload.
        fleet.poll(lambda: "link measured" in fleet.log_of("b"), "b to have measured its link")
        link.hold_in_upload(512 << 10)
        job = fleet.submit(echo_job(2, mib=2.0))
        fleet.until(job, lambda view: view.rounds_committed == 1, "the round to close without b")
        assert not fleet.devices()["b"].online
        assert kept_results(fleet, "b") == 1
        link.release()
        view = fleet.wait(job)
        fleet.poll(lambda: kept_results(fleet, "b") == 0, "b's late result to be answered")

    assert view.state == control_pb2.JOB_STATE_COMPLETED
    first, second = view.history
    assert (first.updates_folded, task_of(first, "b").state) == (1, MISSED)
    assert (second.updates_folded, task_of(second, "b").state) == (2, DONE)
    assert reader.examine(fleet.coordinator_state) == []


def test_a_link_that_flaps_costs_no_update_and_no_process(tmp_path: Path) -> None:
    rounds = 60
    agents = ("a", "b")
    with Link() as link, Fleet(tmp_path, {name: linked(link, name) for name in agents}, start_agents=False) as fleet:
        link.lead(fleet.address)
        for name in agents:
            fleet.start(name)
        job = fleet.submit(echo_job(rounds, quorum=1.0))
        started = [fleet.pid(name) for name in agents]
        for flap in range(1, FLAPS + 1):
            wanted = min(rounds - 1, 2 * flap)
            fleet.until(job, lambda view, wanted=wanted: view.rounds_committed >= wanted, f"round {wanted}")  # type: ignore[misc]
            link.cut()
            link.heal()
        view = fleet.wait(job)

        assert view.state == control_pb2.JOB_STATE_COMPLETED
        assert [entry.updates_folded for entry in view.history] == [2] * rounds
        assert [fleet.pid(name) for name in agents if fleet.alive(name)] == started
        assert all("Traceback" not in fleet.log_of(name) for name in agents)
    assert reader.examine(fleet.coordinator_state) == []


def test_an_agent_that_waits_for_its_coordinator_takes_next_to_nothing(tmp_path: Path) -> None:
    with Fleet(tmp_path, {"a": Agent()}) as fleet:
        # It may have had to try more than once at its start.
        before_it = fleet.log_of("a").count("not connected, retrying")
        fleet.stop_coordinator()
        fleet.poll(lambda: fleet.log_of("a").count("not connected, retrying") > before_it, "the agent to notice")
        process = psutil.Process(fleet.pid("a"))
        before = process.cpu_times()
        # The subject of the test: processor time over a stretch of waiting.
        time.sleep(WAIT_S)
        after = process.cpu_times()
        share = (after.user + after.system - before.user - before.system) / WAIT_S
        assert share < WAITING_CPU_SHARE_MAX, f"{share:.1%} of a core"
        assert fleet.log_of("a").count("not connected, retrying") == before_it + 1, "said once per trouble"
        fleet.start_coordinator()
        fleet.online("a")


def test_a_device_that_stands_still_again_and_again_is_never_counted_twice(tmp_path: Path) -> None:
    # What freezes must not be gone before the round has begun.
    with Fleet(tmp_path, {"a": Agent(), "b": Agent()}, coordinator=("--heartbeat-s", "0.5", "--lease-s", "8")) as fleet:
        fleet.completed(echo_job(1))  # lets each device start its child
        for number in range(STANDSTILLS):
            fleet.freeze("b")
            job = fleet.submit(echo_job(1).replace("links", f"still-{number}"))
            fleet.until(job, lambda view: states(view).get("a") == DONE, "a to be done")
            fleet.offline("b")
            view = fleet.wait(job)
            assert [task_of(view.history[0], name).state for name in "ab"] == [DONE, MISSED]
            fleet.thaw("b")
            fleet.online("b")
        view = fleet.completed(echo_job(3))
        assert [entry.updates_folded for entry in view.history] == [2, 2, 2]
    assert reader.examine(fleet.coordinator_state) == []
