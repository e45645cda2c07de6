"""The work machine: tables of single steps, and a random walk that checks what must never be."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleetune.agent import work
from fleetune.agent.domain import Blob, Evaluated, Failed, FailureKind, Receipt, ReceiptStatus, Refused, Result, Task, TaskKind, Update

METHODS = frozenset({"echo"})


def task(task_id: str = "t1", lease: int = 1, method: str = "echo", epoch: int = 1) -> Task:
    return Task(task_id, lease, epoch, "job", 1, TaskKind.TRAIN, method)


def update(task_id: str = "t1", lease: int = 1) -> Update:
    return Update(task_id, lease, 1, Blob("0" * 64, 10), f"{task_id}.safetensors")


def after(*events: work.Event, state: work.State | None = None) -> tuple[work.State, tuple[work.Command, ...]]:
    """The state after all events, and the commands of the last one."""
    state = state or work.State(methods=METHODS)
    commands: tuple[work.Command, ...] = ()
    for event in events:
        state, commands = work.step(state, event)
        assert work.violations(state) == []
    return state, commands


def receipted(task_id: str = "t1", lease: int = 1) -> work.Receipted:
    return work.Receipted(Receipt(task_id, lease, ReceiptStatus.ACCEPTED))


def test_a_task_starts_at_once_when_nothing_runs() -> None:
    _, commands = after(work.Received(task()))
    assert commands == (work.Start(task()),)


def test_a_second_task_waits_until_the_first_has_ended() -> None:
    state, commands = after(work.Received(task("t1")), work.Received(task("t2")))
    assert commands == ()
    _, commands = after(work.Ended("t1", update("t1")), state=state)
    assert commands == (work.Deliver(update("t1"), fresh=True), work.Start(task("t2")))


def test_the_same_task_and_lease_twice_changes_nothing() -> None:
    once, _ = after(work.Received(task()))
    twice, commands = after(work.Received(task()), state=once)
    assert (twice, commands) == (once, ())


def test_a_newer_lease_of_the_running_task_is_adopted_and_its_result_goes_under_it() -> None:
    state, commands = after(work.Received(task(lease=1)), work.Received(task(lease=3)))
    assert commands == ()
    _, commands = after(work.Ended("t1", update(lease=1)), state=state)
    assert commands == (work.Deliver(update(lease=3), fresh=True),)


def test_an_older_lease_of_the_running_task_is_ignored() -> None:
    state, _ = after(work.Received(task(lease=3)), work.Received(task(lease=2)))
    assert state.running == work.Running(task(lease=3))


def test_a_result_stays_until_its_receipt_and_is_sent_again_at_every_connect() -> None:
    state, _ = after(work.Received(task()), work.Ended("t1", update()))
    state, commands = after(work.Connected(), state=state)
    assert commands == (work.Deliver(update(), fresh=False),)
    state, commands = after(receipted(), state=state)
    assert commands == (work.Forget(update()),)
    assert state.kept == ()
    _, commands = after(work.Connected(), state=state)
    assert commands == ()


def test_a_task_that_is_repeated_after_its_receipt_is_not_run_again() -> None:
    _, commands = after(work.Received(task()), work.Ended("t1", update()), receipted(), work.Received(task()))
    assert commands == ()


def test_a_task_that_is_handed_out_anew_after_its_receipt_is_run_again() -> None:
    _, commands = after(work.Received(task()), work.Ended("t1", update()), receipted(), work.Received(task(lease=2)))
    assert commands == (work.Start(task(lease=2)),)


def test_a_finished_update_is_sent_again_under_a_newer_lease_and_an_older_receipt_still_ends_it() -> None:
    state, commands = after(work.Received(task()), work.Ended("t1", update()), work.Received(task(lease=2)))
    assert commands == (work.Deliver(update(lease=2), fresh=False),)
    _, commands = after(receipted(lease=1), state=state)
    assert commands == (work.Forget(update(lease=2)),)


def test_a_receipt_of_an_older_try_does_not_end_the_newer_one() -> None:
    refused = (work.AvailabilityChanged(False, "on battery"), work.Received(task(lease=1)), work.AvailabilityChanged(True, ""))
    state, commands = after(*refused, work.Received(task(lease=2)))
    assert commands == (work.Forget(Refused("t1", 1, 1, "on battery")), work.Start(task(lease=2)))
    _, commands = after(work.Ended("t1", update(lease=2)), receipted(lease=1), state=state)
    assert commands == ()


def test_a_cancelled_running_task_is_stopped_and_its_result_dropped() -> None:
    state, commands = after(work.Received(task()), work.CancelAsked("t1"))
    assert commands == (work.Stop("t1"),)
    assert state.unfinished() == ()
    state, commands = after(work.Ended("t1", update()), state=state)
    assert commands == (work.Forget(update()),)
    assert state.kept == ()


def test_a_cancelled_task_that_comes_again_under_the_same_lease_is_not_run() -> None:
    _, commands = after(work.Received(task()), work.CancelAsked("t1"), work.Ended("t1", None), work.Received(task()))
    assert commands == ()


def test_a_newer_lease_while_the_cancelled_run_still_ends_starts_after_it() -> None:
    state, commands = after(work.Received(task()), work.CancelAsked("t1"), work.Received(task(lease=2)))
    assert commands == ()
    _, commands = after(work.Ended("t1", None), state=state)
    assert commands == (work.Start(task(lease=2)),)


def test_cancelling_a_waiting_task_removes_it() -> None:
    state, commands = after(work.Received(task("t1")), work.Received(task("t2")), work.CancelAsked("t2"))
    assert commands == ()
    assert state.queue == ()


def test_cancelling_a_finished_task_stops_its_upload() -> None:
    _, commands = after(work.Received(task()), work.Ended("t1", update()), work.CancelAsked("t1"))
    assert commands == (work.Forget(update()),)


def test_a_task_of_another_epoch_takes_the_place_of_the_running_one_of_the_same_id() -> None:
    state, commands = after(work.Received(task(lease=7)), work.Received(task(lease=3, epoch=2)))
    assert commands == (work.Stop("t1"),)
    assert state.queue == (task(lease=3, epoch=2),)
    _, commands = after(work.Ended("t1", update(lease=7)), state=state)
    assert commands == (work.Forget(update(lease=7)), work.Start(task(lease=3, epoch=2)))


def test_a_task_of_another_epoch_takes_the_place_of_the_waiting_one_of_the_same_id() -> None:
    state, commands = after(work.Received(task("t0")), work.Received(task(lease=7)), work.Received(task(lease=3, epoch=2)))
    assert commands == ()
    assert state.queue == (task(lease=3, epoch=2),)


def test_a_result_is_never_carried_over_into_another_epoch() -> None:
    for lease in (3, 9):
        state, _ = after(work.Recovered((update(lease=7),)))
        _, commands = after(work.Received(task(lease=lease, epoch=2)), state=state)
        assert commands == (work.Forget(update(lease=7)), work.Start(task(lease=lease, epoch=2)))


def test_a_task_that_ended_in_another_epoch_is_run_again_under_its_id() -> None:
    state, _ = after(work.Received(task(lease=7)), work.Ended("t1", update(lease=7)), receipted(lease=7))
    assert after(work.Received(task(lease=7)), state=state)[1] == ()
    _, commands = after(work.Received(task(lease=3, epoch=2)), state=state)
    assert commands == (work.Start(task(lease=3, epoch=2)),)


def test_tasks_are_refused_with_the_owner_s_reason_while_the_device_is_not_available() -> None:
    _, commands = after(work.AvailabilityChanged(False, "on battery"), work.Received(task()))
    assert commands == (work.Deliver(Refused("t1", 1, 1, "on battery"), fresh=True),)


def test_waiting_tasks_are_refused_when_the_device_becomes_unavailable_and_the_running_one_goes_on() -> None:
    state, commands = after(work.Received(task("t1")), work.Received(task("t2")), work.AvailabilityChanged(False, "in use"))
    assert commands == (work.Deliver(Refused("t2", 1, 1, "in use"), fresh=True),)
    assert state.running == work.Running(task("t1"))


def test_an_unknown_method_is_a_failure_that_names_the_known_ones() -> None:
    _, (command,) = after(work.Received(task(method="magic")))
    assert isinstance(command, work.Deliver)
    assert isinstance(command.result, Failed)
    assert command.result.kind is FailureKind.UNSUPPORTED
    assert "'magic'" in command.result.message
    assert "echo" in command.result.message


def test_more_tasks_than_the_queue_holds_are_refused() -> None:
    state, _ = after(*(work.Received(task(f"t{number}")) for number in range(work.QUEUE_TASKS_MAX + 1)))
    _, (command,) = after(work.Received(task("more")), state=state)
    assert isinstance(command, work.Deliver)
    assert isinstance(command.result, Refused)


def test_a_task_that_cannot_be_read_is_answered_with_a_failure_once() -> None:
    state, (command,) = after(work.Unusable("t1", 1, "no kind"))
    assert isinstance(command, work.Deliver)
    assert isinstance(command.result, Failed)
    assert after(work.Unusable("t1", 1, "no kind"), state=state)[1] == ()


def test_an_update_that_cannot_be_delivered_becomes_a_failure() -> None:
    state, commands = after(
        work.Received(task()), work.Ended("t1", update()), work.Undeliverable("t1", 1, FailureKind.TRANSFER, "file is gone")
    )
    failed = Failed("t1", 1, 1, FailureKind.TRANSFER, "upload", "file is gone")
    assert commands == (work.Forget(update()), work.Deliver(failed, fresh=True))
    assert after(receipted(), state=state)[1] == (work.Forget(failed),)


def test_results_found_at_start_are_sent_after_the_first_connect() -> None:
    evaluated = Evaluated("t2", 1, 1, b"")
    state, commands = after(work.Recovered((update(), evaluated)))
    assert commands == ()
    _, commands = after(work.Connected(), state=state)
    assert commands == (work.Deliver(update(), fresh=False), work.Deliver(evaluated, fresh=False))


class AgentAndCoordinator(RuleBasedStateMachine):
    """Random tasks, cancels, ends, receipts, cuts and restarts against a model of what was started and what is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.state = work.State(methods=METHODS)
        self.running: str | None = None
        self.recorded: dict[str, Result] = {}
        self.sent: list[Result] = []
        self.started: set[tuple[str, int]] = set()

    def feed(self, event: work.Event) -> None:
        self.state, commands = work.step(self.state, event)
        for command in commands:
            if isinstance(command, work.Start):
                assert self.running is None, "two tasks at once"
                self.running = command.task.task_id
                key = (command.task.task_id, command.task.lease)
                assert key not in self.started, "the same task and lease ran twice"
                self.started.add(key)
            elif isinstance(command, work.Stop):
                assert self.running == command.task_id
            elif isinstance(command, work.Deliver):
                if command.fresh:
                    self.recorded[command.result.task_id] = command.result
                self.sent.append(command.result)
            else:
                recorded = self.recorded.get(command.result.task_id)
                if recorded is not None and recorded.lease <= command.result.lease:
                    del self.recorded[command.result.task_id]

    @initialize()
    def connect_first(self) -> None:
        self.feed(work.Connected())

    @rule(number=st.integers(0, 4), lease=st.integers(1, 4), method=st.sampled_from(["echo", "echo", "echo", "magic"]))
    def hand_out(self, number: int, lease: int, method: str) -> None:
        self.feed(work.Received(task(f"t{number}", lease, method)))

    @rule(number=st.integers(0, 4))
    def cancel(self, number: int) -> None:
        self.feed(work.CancelAsked(f"t{number}"))

    @precondition(lambda self: self.running is not None)
    @rule(kind=st.sampled_from(["update", "evaluated", "failed", "nothing"]))
    def end(self, kind: str) -> None:
        task_id, self.running = self.running, None
        assert task_id is not None
        running = self.state.running
        assert running is not None
        lease = running.task.lease
        results: dict[str, Result | None] = {
            "update": update(task_id, lease),
            "evaluated": Evaluated(task_id, lease, 1, b""),
            "failed": Failed(task_id, lease, 1, FailureKind.CRASH, "train", ""),
            "nothing": None,
        }
        # Only a stopped task ends without a result.
        self.feed(work.Ended(task_id, results[kind] if kind != "nothing" or running.stopping else results["update"]))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def receive_receipt(self, data: st.DataObject) -> None:
        result = data.draw(st.sampled_from(self.sent))
        self.feed(receipted(result.task_id, result.lease))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def give_up_on(self, data: st.DataObject) -> None:
        result = data.draw(st.sampled_from(self.sent))
        if isinstance(result, Update):
            self.feed(work.Undeliverable(result.task_id, result.lease, FailureKind.TRANSFER, ""))

    @rule(accepts=st.booleans())
    def change_availability(self, accepts: bool) -> None:
        self.feed(work.AvailabilityChanged(accepts, "" if accepts else "in use"))

    @rule()
    def reconnect(self) -> None:
        self.feed(work.Connected())

    @rule()
    def restart_after_kill(self) -> None:
        self.state = work.State(methods=METHODS)
        self.running = None
        self.started.clear()
        self.feed(work.Recovered(tuple(self.recorded.values())))
        self.feed(work.Connected())

    @invariant()
    def nothing_is_in_two_places(self) -> None:
        assert work.violations(self.state) == []

    @invariant()
    def what_is_kept_is_what_is_recorded(self) -> None:
        assert {kept.result.task_id for kept in self.state.kept} == set(self.recorded)

    @invariant()
    def what_runs_is_what_was_started(self) -> None:
        assert (self.state.running.task.task_id if self.state.running else None) == self.running


TestAgentAndCoordinator = AgentAndCoordinator.TestCase
TestAgentAndCoordinator.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
