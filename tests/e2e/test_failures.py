"""What goes wrong in a fleet of real processes, what becomes of the job, and what a person reads."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from fleetune.coordinator.exitcodes import ExitCode
from fleetune.v1 import control_pb2, fleet_pb2, messages_pb2
from fleetune.wire import channel
from support import tiny_models
from support.fleet import ENDED, Agent, Fleet, JobView, task_of, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

LABELS = list(tiny_models.LABELS)

BRISK = ("--heartbeat-s", "0.5", "--lease-s", "5")
"""Devices that are gone are noticed soon."""

AGENT_REFUSED = 4

DONE = control_pb2.DEVICE_TASK_STATE_DONE
ASSIGNED = control_pb2.DEVICE_TASK_STATE_ASSIGNED
FAILED = control_pb2.DEVICE_TASK_STATE_FAILED
MISSED = control_pb2.DEVICE_TASK_STATE_MISSED


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    good = tiny_models.coloured_rows(24)
    write = tiny_models.write_jsonl
    write(folder / "good.jsonl", good)
    # Enough for a training that is still under way whenever a test looks.
    write(folder / "many.jsonl", tiny_models.coloured_rows(20_000))
    write(folder / "unlabelled.jsonl", [*good, {"text": "the green lamp"}])
    write(folder / "mauve.jsonl", [*good, {"text": "the mauve lamp", "label": "mauve"}])
    return folder


def echo_job(count: int, **tables: Mapping[str, object]) -> str:
    """Rounds of moments: what it takes to test a fleet's life, without any model."""
    document: dict[str, dict[str, object]] = {"method": {"name": "echo", "state_mib": 0.1}, "rounds": {"count": count}}
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    return toml({"name": "link", **document})


def training_job(base: str | Path, **tables: Mapping[str, object]) -> str:
    document: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "allow_hub": False},
        "task": {"kind": "text-classification", "labels": LABELS},
        "lora": {"rank": 4, "alpha": 8, "targets": ["query", "value"]},
        "data": {"name": "colours", "max_length": 32},
        "training": {"epochs": 1.0, "batch_size": 8, "learning_rate": 0.01},
        "rounds": {"count": 2},
        "devices": {"minimum": 2, "wait_s": 60},
        "evaluation": {"source": "none"},
    }
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    return toml({"name": "tiny", "seed": 3, **document})


def state_of(view: JobView, device: str) -> control_pb2.DeviceTaskState.ValueType:
    """How far a device's training in the open round is."""
    states = [task.state for task in view.current.tasks if task.device_name == device]
    return states[0] if states else control_pb2.DEVICE_TASK_STATE_UNSPECIFIED


# --- devices and coordinators that go away


PATIENT = ("--heartbeat-s", "0.5", "--lease-s", "10")
"""A device that is frozen counts as connected for as long as others need for a task, also on a busy machine."""


def warmed_up(fleet: Fleet, devices: int) -> None:
    """Let each device start its child, which may take longer than a lease."""
    fleet.completed(echo_job(1, devices={"minimum": devices}))


def test_a_round_closes_without_a_device_killed_in_it_which_takes_part_again_later(tmp_path: Path) -> None:
    with Fleet(tmp_path, {name: Agent() for name in "abc"}, coordinator=PATIENT) as fleet:
        warmed_up(fleet, 3)
        fleet.freeze("c")
        job = fleet.submit(echo_job(2, devices={"minimum": 3}))
        fleet.until(job, lambda view: [state_of(view, name) for name in "abc"] == [DONE, DONE, ASSIGNED], "all but c to be done")
        fleet.kill9("c")
        fleet.until(job, lambda view: view.rounds_committed == 1, "the round to close without c")
        # The second round waits for three devices.
        fleet.start("c")
        view = fleet.wait(job)

    assert view.state == control_pb2.JOB_STATE_COMPLETED
    first, second = view.history
    assert (first.updates_folded, task_of(first, "c").state) == (2, MISSED)
    assert "offline" in task_of(first, "c").failure.message
    assert (second.updates_folded, task_of(second, "c").state) == (3, DONE)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_agents_come_back_to_a_coordinator_that_was_away_and_the_open_round_goes_on(tmp_path: Path, end: signal.Signals) -> None:
    """An update with a receipt is not asked for again."""
    # A lease that outlasts every try to come back: else the round would close without who comes late.
    with Fleet(tmp_path, {"a": Agent(), "b": Agent()}, coordinator=("--heartbeat-s", "0.5", "--lease-s", "60")) as fleet:
        warmed_up(fleet, 2)
        fleet.freeze("b")
        job = fleet.submit(echo_job(3, devices={"minimum": 2}))
        fleet.until(job, lambda view: (state_of(view, "a"), state_of(view, "b")) == (DONE, ASSIGNED), "a to be done and b not")
        fleet.stop_coordinator(end)
        fleet.thaw("b")
        # The subject of the test: longer than the first tries of an agent to come back.
        time.sleep(6)
        fleet.start_coordinator()
        view = fleet.wait(job)
        received = [line for line in fleet.log_of("a").splitlines() if f"task received task={job}/1/" in line]

    assert view.state == control_pb2.JOB_STATE_COMPLETED
    assert [entry.updates_folded for entry in view.history] == [2, 2, 2]
    assert len(received) == 1


def test_a_device_that_stands_still_is_left_behind_and_its_late_update_is_not_folded(tmp_path: Path) -> None:
    # A lease that outlasts the round: it is the deadline that closes it.
    with Fleet(tmp_path, {"a": Agent(), "b": Agent()}, coordinator=("--heartbeat-s", "0.5", "--lease-s", "60")) as fleet:
        warmed_up(fleet, 2)
        fleet.freeze("b")
        view = fleet.wait(fleet.submit(echo_job(1, rounds={"deadline_s": 12.0}, devices={"minimum": 2})))
        fleet.thaw("b")
        fleet.online("b")

    assert view.state == control_pb2.JOB_STATE_COMPLETED
    assert [task_of(view.history[0], name).state for name in "ab"] == [DONE, MISSED]
    assert "deadline" in task_of(view.history[0], "b").failure.message


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[Fleet]:
    """A device with few rows and one with so many that its training can be met under way."""
    good, many = f"{rows}/good.jsonl", f"{rows}/many.jsonl"
    agents = {"quick": Agent({"colours": good, "few": good}), "slow": Agent({"colours": many, "few": good})}
    with Fleet(tmp_path_factory.mktemp("slow"), agents, coordinator=BRISK) as fleet:
        yield fleet


LONG = {"epochs": 40.0}
"""The slow device never comes to their end, and the quick one soon does: whatever is held up, the one trains while the other is done."""


def under_way(fleet: Fleet, job: str) -> psutil.Process:
    """The child of the device that still trains while the other is done."""

    def trains(view: JobView) -> bool:
        tasks = {task.device_name: task for task in view.current.tasks}
        if set(tasks) != {"quick", "slow"} or (tasks["quick"].state, tasks["slow"].state) != (DONE, ASSIGNED):
            return False
        return tasks["slow"].stage == fleet_pb2.TASK_STAGE_TRAINING and tasks["slow"].done > 0

    fleet.until(job, trains, "the slow device to train alone")
    child = fleet.child_of("slow")
    assert child is not None
    return child


def test_a_killed_training_process_is_reported_with_device_stage_and_signal(slow: Fleet, bert: Path) -> None:
    job = slow.submit(training_job(bert, rounds={"count": 1}, training=LONG))
    under_way(slow, job).kill()

    view = slow.wait(job)

    assert view.state == control_pb2.JOB_STATE_COMPLETED
    assert view.history[0].updates_folded == 1
    task = task_of(view.history[0], "slow")
    assert (task.state, task.failure.kind, task.failure.stage) == (FAILED, messages_pb2.FAILURE_KIND_CRASH, "train")
    assert "SIGKILL" in task.failure.message
    report = slow.cli("report", job).stdout
    assert "slow" in report and "SIGKILL" in report


def test_a_training_process_without_memory_is_reported_as_that_and_replaced(slow: Fleet, bert: Path) -> None:
    # The job after it has another recipe, and its model is loaded anew: whatever is held up, that cannot do with the memory there is.
    slow.completed(training_job(bert, rounds={"count": 1}, data={"name": "few"}, devices={"keep_warm_s": 600}))
    child = slow.child_of("slow")
    assert child is not None
    child.rlimit(psutil.RLIMIT_AS, (64 * 1024**2, resource.RLIM_INFINITY))
    job = slow.submit(training_job(bert, rounds={"count": 1}, training={"batch_size": 2048}, data={"max_length": 64}))

    view = slow.wait(job)
    # The next test's child is to have all the memory there is; this one may have ended by itself.
    with contextlib.suppress(psutil.NoSuchProcess):
        child.kill()

    failure = task_of(view.history[0], "slow").failure
    assert failure.kind == messages_pb2.FAILURE_KIND_OUT_OF_MEMORY, failure
    assert "memory" in failure.message.lower()
    assert "Traceback" in failure.traceback


def test_an_agent_killed_in_its_training_takes_the_training_with_it(tmp_path: Path, rows: Path, bert: Path) -> None:
    agents = {"quick": Agent({"colours": f"{rows}/good.jsonl"}), "slow": Agent({"colours": f"{rows}/many.jsonl"})}
    with Fleet(tmp_path, agents, coordinator=BRISK) as fleet:
        job = fleet.submit(training_job(bert, rounds={"count": 1}, training=LONG))
        child = under_way(fleet, job)
        fleet.kill9("slow")

        psutil.wait_procs([child], timeout=60)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        view = fleet.wait(job)

    assert (view.state, view.history[0].updates_folded) == (control_pb2.JOB_STATE_COMPLETED, 1)


def test_ctrl_c_in_the_middle_of_a_training_ends_everything_without_a_trace(tmp_path: Path, rows: Path, bert: Path) -> None:
    agents = {"quick": Agent({"colours": f"{rows}/good.jsonl"}), "slow": Agent({"colours": f"{rows}/many.jsonl"})}
    with Fleet(tmp_path, agents) as fleet:
        under_way(fleet, fleet.submit(training_job(bert, training=LONG)))

        codes = [fleet.stop("slow", signal.SIGINT), fleet.stop_coordinator(signal.SIGINT), fleet.stop("quick", signal.SIGINT)]

        assert codes == [0, 0, 0]
        assert fleet.left_behind() == []
        for name in ("coordinator", "slow", "quick"):
            assert "Traceback" not in fleet.log_of(name), fleet.log_of(name)


# --- agents that are not taken


def test_the_second_agent_with_a_copied_id_is_refused_by_name(tmp_path: Path) -> None:
    # The first must not lose its place because it was held up for a moment.
    lease = ("--heartbeat-s", "0.5", "--lease-s", "15")
    with Fleet(tmp_path, {"first": Agent(), "copy": Agent()}, coordinator=lease, start_agents=False, plaintext=True) as fleet:
        fleet.start("first")
        fleet.state_of("copy").mkdir(parents=True)
        shutil.copy(fleet.state_of("first") / "device-id", fleet.state_of("copy") / "device-id")
        fleet.start("copy", wait=False)

        assert fleet.wait_exit("copy") == AGENT_REFUSED
        last = fleet.log_of("copy").strip()
        assert "'first'" in last and "'copy'" in last and "id file" in last
        assert "Traceback" not in last
        assert fleet.devices()["first"].online


def test_an_agent_of_another_protocol_is_refused_with_both_versions(tmp_path: Path) -> None:
    newer = Agent(prelude="from fleetune.wire import channel; channel.PROTOCOL_MAJOR = 9")
    with Fleet(tmp_path, {"newer": newer}, start_agents=False) as fleet:
        fleet.start("newer", wait=False)

        assert fleet.wait_exit("newer") == AGENT_REFUSED
        last = fleet.log_of("newer").strip().splitlines()[-1]
        minor = channel.PROTOCOL_MINOR
        assert f"protocol 9.{minor}" in last and f"{channel.PROTOCOL_MAJOR}.{minor}" in last and "same version" in last


# --- jobs that cannot work


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[Fleet]:
    """One device whose data have every fault, each under a name of its own."""
    data = {
        "colours": f"{rows}/good.jsonl",
        "gone": f"{rows}/nowhere.jsonl",
        "unlabelled": f"{rows}/unlabelled.jsonl",
        "mauve": f"{rows}/mauve.jsonl",
    }
    with Fleet(tmp_path_factory.mktemp("faulty"), {"kitchen": Agent(data)}, coordinator=BRISK) as fleet:
        yield fleet


def submitted(fleet: Fleet, text: str) -> tuple[int, str]:
    """`fleetune submit - --wait`: the exit code, and all that a person reads."""
    done = fleet.cli("submit", "-", "--wait", stdin=text)
    said = " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    return done.returncode, said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"data": {"name": "gone"}}, ["kitchen", "nowhere.jsonl"], id="a data file that is not there"),
        pytest.param({"data": {"name": "unlabelled"}}, ["kitchen", "unlabelled.jsonl", "25", "label"], id="a row without label"),
        pytest.param({"data": {"name": "mauve"}}, ["kitchen", "mauve", "25", "red"], id="an unknown label"),
        pytest.param({"data": {"text": "sentence"}}, ["kitchen", "sentence", "text"], id="a column that the rows lack"),
        pytest.param({"lora": {"targets": ["querry"]}}, ["querry", "query", "value", "key"], id="a wrong LoRA target"),
        pytest.param({"model": {"base": "nobody/no-model", "allow_hub": True}}, ["nobody/no-model"], id="an unknown model of the hub"),
        pytest.param(
            {"training": {"learning_rate": 10.0, "max_grad_norm": 0.0, "epochs": 50.0}, "model": {"dtype": "float16"}},
            ["kitchen", "loss", "nan", "Lower the learning rate"],
            id="a loss that is no number",
        ),
    ],
)
def test_a_job_that_cannot_work_fails_and_says_what_to_do(
    faulty: Fleet, bert: Path, change: dict[str, dict[str, object]], words: list[str]
) -> None:
    tables: dict[str, Mapping[str, object]] = {"devices": {"minimum": 1}, **change}
    text = training_job(bert, **tables)

    code, said = submitted(faulty, text)

    assert code == ExitCode.JOB_FAILED, said
    assert [word for word in words if word not in said] == [], said


def test_a_base_folder_that_is_not_there_is_a_mistake_of_the_job_file(faulty: Fleet) -> None:
    code, said = submitted(faulty, training_job("/nowhere/model"))

    assert code == ExitCode.USAGE
    assert "model.base" in said and "/nowhere/model" in said and "config.json" in said


def test_a_job_whose_data_nobody_has_tells_so_while_it_waits_and_gives_up(faulty: Fleet, bert: Path) -> None:
    # Long enough to be looked at before it is over.
    job = faulty.submit(training_job(bert, data={"name": "secrets"}, devices={"minimum": 1, "wait_s": 12}))

    def tells(view: JobView) -> bool:
        return view.state == control_pb2.JOB_STATE_WAITING and "kitchen" in view.message and "no data named 'secrets'" in view.message

    faulty.until(job, tells, "the job to wait and to tell why")

    done = faulty.cli("watch", job)
    assert done.returncode == ExitCode.JOB_FAILED
    assert "devices.wait_s" in done.stdout + done.stderr


def test_a_cancelled_job_has_an_exit_code_of_its_own(faulty: Fleet) -> None:
    job = faulty.submit(echo_job(1, devices={"minimum": 5}))
    assert faulty.cli("cancel", job, "--reason", "wrong data").returncode == ExitCode.OK

    done = faulty.cli("watch", job)

    assert done.returncode == ExitCode.JOB_CANCELLED
    assert "wrong data" in done.stdout


def test_the_fleet_works_on_after_all_these_jobs(faulty: Fleet, bert: Path) -> None:
    view = faulty.wait(faulty.submit(training_job(bert, devices={"minimum": 1}, rounds={"count": 1})))

    assert view.state == control_pb2.JOB_STATE_COMPLETED
    assert all(job.state in ENDED for job in faulty.control.ListJobs(control_pb2.ListJobsRequest(), timeout=180).jobs)
