"""Hostile and clumsy clients: each gets its answer, the coordinator stays up, nothing half-done stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from blake3 import blake3

from fleetune.coordinator.rounds.admission import SAMPLES_MAX
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rpc import fleet as fleet_module
from fleetune.coordinator.store import records
from fleetune.v1 import blob_pb2, control_pb2, fleet_pb2, fleet_pb2_grpc, messages_pb2
from fleetune.wire import channel, codec
from fleetune.wire.answers import Answer
from support.coordinating import WAIT_S, Coordinator, committed, coordinating, echo_job
from support.echo_agent import ANSWER_S, EchoAgent, chunks, echoed

Status = grpc.StatusCode
ACCEPTED = messages_pb2.RECEIPT_STATUS_ACCEPTED
DUPLICATE = messages_pb2.RECEIPT_STATUS_DUPLICATE
LATE = messages_pb2.RECEIPT_STATUS_LATE
REFUSED = messages_pb2.RECEIPT_STATUS_REFUSED


@pytest_asyncio.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[Coordinator]:
    async with coordinating(tmp_path) as running:
        yield running
        assert not running.writer.done(), "the engine still runs"
        # Whatever was done to it, an honest device still gets its work done.
        for job in list(running.engine.jobs.values()):
            if not job.ended:
                await running.control.CancelJob(control_pb2.CancelJobRequest(job_id=job.job_id))
                await running.ended(job)
        async with EchoAgent(running.address, "honest", tags=["honest"]) as honest:
            honest.serve()
            job = await running.ended(await running.submit(echo_job(rounds=1, devices_extra='tags = ["honest"]'), "the-honest-job"))
            assert job.machine.status == "completed"
        kept = {entry.state.digest for job in running.engine.jobs.values() for entry in job.history if entry.state}
        with contextlib.suppress(asyncio.TimeoutError):  # what was refused is cleared away in the background
            await asyncio.wait_for(holds(running, kept), WAIT_S)
        assert running.spooled() == []
        assert running.blobs() == kept
    vars(running).clear()


async def holds(coordinator: Coordinator, blobs: set[str]) -> None:
    while coordinator.blobs() != blobs:  # noqa: ASYNC110  # nobody announces it
        await asyncio.sleep(0.01)


@dataclass
class Round:
    """A round of two devices that waits for both; `data` is device a's honest update."""

    a: EchoAgent
    b: EchoAgent
    job: LiveJob
    task: messages_pb2.Task
    data: bytes

    def status(self, name: str = "a") -> str:
        assert self.job.machine.round is not None
        (task,) = [t for t in self.job.machine.round.tasks.values() if t.device_name == name]
        return task.status

    @property
    def state(self) -> bytes:
        return echoed(self.data, 0)


@pytest_asyncio.fixture
async def opened(coordinator: Coordinator) -> AsyncIterator[Round]:
    async with EchoAgent(coordinator.address, "a") as a, EchoAgent(coordinator.address, "b") as b:
        job = await coordinator.submit(echo_job(rounds=1, minimum=2), "the-attacked-job")
        task = await a.next_task()
        yield Round(a, b, job, task, await a.trained(task))


async def code_of(call: object) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    assert "Traceback" not in (caught.value.details() or "")
    return caught.value.code()


# --- the control stream


@contextlib.asynccontextmanager
async def dialled(address: str) -> AsyncIterator[grpc.aio.Channel]:
    opened_channel = channel.open_channel(address)
    try:
        yield opened_channel
    finally:
        await opened_channel.close()


async def first_answer(address: str, *requests: fleet_pb2.SessionRequest) -> object:
    async with dialled(address) as opened_channel:
        call = fleet_pb2_grpc.FleetServiceStub(opened_channel).Session()
        told = Answer(call)
        for request in requests:
            await told.heard(call.write(request))
        if not requests:
            await call.done_writing()
        return await asyncio.wait_for(told.heard(call.read()), ANSWER_S)


async def test_a_stream_that_begins_with_something_else_than_hello_is_ended(coordinator: Coordinator) -> None:
    beat = fleet_pb2.SessionRequest(heartbeat=fleet_pb2.Heartbeat(sequence=1))
    assert await code_of(first_answer(coordinator.address, beat)) == Status.INVALID_ARGUMENT
    assert await code_of(first_answer(coordinator.address)) == Status.INVALID_ARGUMENT
    assert await code_of(first_answer(coordinator.address, fleet_pb2.SessionRequest())) == Status.INVALID_ARGUMENT


async def test_a_silent_stream_is_ended(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "HELLO_S", 0.05)
    async with dialled(coordinator.address) as opened_channel:
        call = fleet_pb2_grpc.FleetServiceStub(opened_channel).Session()
        assert await code_of(asyncio.wait_for(call.read(), ANSWER_S)) == Status.DEADLINE_EXCEEDED


async def test_another_protocol_is_refused_by_number(coordinator: Coordinator) -> None:
    agent = EchoAgent(coordinator.address, "a")
    agent.hello.protocol_major = 7
    async with agent:
        assert agent.refusal is not None
        assert agent.refusal.kind == fleet_pb2.REFUSAL_KIND_PROTOCOL
        assert f"7.{channel.PROTOCOL_MINOR}" in agent.refusal.message
        assert f"{channel.PROTOCOL_MAJOR}.{channel.PROTOCOL_MINOR}" in agent.refusal.message
        assert agent.refusal.retry_after_s == 0


async def test_a_newer_minor_version_is_welcome(coordinator: Coordinator) -> None:
    agent = EchoAgent(coordinator.address, "a")
    agent.hello.protocol_minor = 9
    async with agent:
        assert agent.welcome is not None
        assert agent.welcome.protocol_minor == channel.PROTOCOL_MINOR


async def test_an_agent_of_minor_0_is_welcome_and_works(coordinator: Coordinator) -> None:
    agent = EchoAgent(coordinator.address, "a", data_names=["intents"])
    agent.hello.protocol_minor = 0
    async with agent:
        agent.serve()
        assert agent.welcome is not None
        assert agent.welcome.protocol_minor == 0
        job = await coordinator.ended(await coordinator.submit(echo_job(rounds=2), evaluated=True))
        assert job.machine.status == "completed"
        session = coordinator.engine.registry.sessions[agent.device_id]
        assert session.greeting.train_data_names == session.greeting.validation_data_names == {"intents"}


STRANGE_WORDS: list[tuple[str, object]] = [
    ("device_name", ""),
    ("device_name", "../../etc"),
    ("device_name", "a\n"),
    ("device_name", "x" * 64),
    ("device_id", "short"),
    ("device_id", "a/b/c/d/e/f"),
    ("device_id", "device-a\n"),
    ("instance_id", ""),
    ("instance_id", "x" * 65),
    ("tags", ["x"] * 1001),
    ("tags", ["\x1b[31mred"]),
    ("data_names", ["x" * 201]),
    ("train_data_names", ["x"] * 1001),
    ("validation_data_names", ["two\nlines"]),
]


async def test_a_hello_with_strange_words_is_refused(coordinator: Coordinator) -> None:
    for field, value in STRANGE_WORDS:
        agent = EchoAgent(coordinator.address, "a")
        agent.hello.ClearField(field)  # type: ignore[arg-type]
        agent.hello.MergeFrom(fleet_pb2.Hello(**{field: value}))  # type: ignore[arg-type]
        async with agent:
            assert agent.refusal is not None, (field, value)
            assert agent.refusal.kind == fleet_pb2.REFUSAL_KIND_INVALID
    assert coordinator.engine.registry.sessions == {}


async def test_a_copied_id_is_refused_and_the_first_keeps_its_session(coordinator: Coordinator) -> None:
    async with EchoAgent(coordinator.address, "a") as first:
        async with EchoAgent(coordinator.address, "b", device_id=first.device_id, instance_id="run-2") as second:
            assert second.refusal is not None
            assert second.refusal.kind == fleet_pb2.REFUSAL_KIND_DUPLICATE_ID
            assert "'a'" in second.refusal.message
            assert second.refusal.retry_after_s > 0
        await first.say(heartbeat=fleet_pb2.Heartbeat(sequence=1))
        assert [s.greeting.name for s in coordinator.engine.registry.sessions.values()] == ["a"]


async def test_a_taken_name_is_refused_for_good(coordinator: Coordinator) -> None:
    async with EchoAgent(coordinator.address, "a"), EchoAgent(coordinator.address, "a", device_id="device-other") as second:
        assert second.refusal is not None
        assert second.refusal.kind == fleet_pb2.REFUSAL_KIND_NAME_TAKEN
        assert second.refusal.retry_after_s == 0


async def test_an_agent_that_is_cut_while_it_is_welcomed_is_not_online(coordinator: Coordinator) -> None:
    for _ in range(20):
        async with dialled(coordinator.address) as opened_channel:
            call = fleet_pb2_grpc.FleetServiceStub(opened_channel).Session()
            await call.write(fleet_pb2.SessionRequest(hello=EchoAgent("", "a").hello))
            call.cancel()
    while coordinator.engine.registry.sessions or coordinator.fleet.lines:  # noqa: ASYNC110  # dictionaries that nobody announces
        await asyncio.sleep(0.02)


async def test_garbage_on_the_port_disturbs_nobody(coordinator: Coordinator) -> None:
    host, _, port = coordinator.address.rpartition(":")
    async with EchoAgent(coordinator.address, "a") as agent:
        for bytes_ in (os.urandom(5000), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(5000)):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(bytes_)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
                await asyncio.wait_for(reader.read(), ANSWER_S)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await agent.say(heartbeat=fleet_pb2.Heartbeat(sequence=1))
        assert len(coordinator.engine.registry.sessions) == 1


async def test_bytes_that_are_no_message_end_that_stream_only(coordinator: Coordinator) -> None:
    async with EchoAgent(coordinator.address, "a"), dialled(coordinator.address) as opened_channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = opened_channel.stream_stream("/fleetune.v1.FleetService/Session")()
        await call.write(b"\xff\xff\xff\xff")
        assert await code_of(asyncio.wait_for(call.read(), ANSWER_S)) in {Status.INTERNAL, Status.UNKNOWN, Status.INVALID_ARGUMENT}
        assert len(coordinator.engine.registry.sessions) == 1


async def test_an_oversized_message_is_refused_before_it_is_read(coordinator: Coordinator) -> None:
    async with EchoAgent(coordinator.address, "a"):
        big = grpc.aio.insecure_channel(coordinator.address, options=[("grpc.max_send_message_length", -1)])
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = big.unary_unary("/fleetune.v1.ControlService/ValidateJob")
        request = control_pb2.ValidateJobRequest(job_toml="x" * (channel.MESSAGE_BYTES_MAX + 1)).SerializeToString()
        assert await code_of(call(request, timeout=ANSWER_S)) == Status.RESOURCE_EXHAUSTED
        await big.close()
        assert len(coordinator.engine.registry.sessions) == 1


TASKS_THAT_NEVER_WERE = [
    "",
    "/",
    "x/1/device-a/train",
    "{job}",
    "{job}/²/device-a/train",
    "{job}/1/device-a",
    "{job}/9/device-a/train",
    "{job}/99999999999999999999/device-a/train",
    "{job}/0/device-a/evaluate",
    "{job}/1/device-b/train",
    "x" * 100_000,
]


async def test_words_about_tasks_that_never_were_change_nothing(coordinator: Coordinator, opened: Round) -> None:
    for task_id in (text.format(job=opened.job.job_id) for text in TASKS_THAT_NEVER_WERE):
        await opened.a.say(log=fleet_pb2.TaskLog(task_id=task_id, lines=["x"]))
        await opened.a.say(progress=fleet_pb2.TaskProgress(task_id=task_id, done=5, total=2**64 - 1))
        failure = messages_pb2.Failure(kind=messages_pb2.FailureKind.ValueType(77), message="x")
        for outcome in (
            fleet_pb2.TaskOutcome(task_id=task_id, failure=failure),
            fleet_pb2.TaskOutcome(task_id=task_id, evaluation=messages_pb2.Evaluation(rows=2**64 - 1)),
            fleet_pb2.TaskOutcome(task_id=task_id, refusal=fleet_pb2.TaskRefusal()),
        ):
            await opened.a.say(outcome=outcome)
            assert (await opened.a.next_receipt()).status in {REFUSED, LATE}
        header = opened.a.header(opened.task, opened.data)
        header.task_id = task_id
        assert (await opened.a.upload(opened.task, opened.data, header=header)).status == REFUSED
    assert (opened.status("a"), opened.status("b")) == ("assigned", "assigned")


async def test_an_evaluation_is_no_result_of_a_train_task(opened: Round) -> None:
    evaluation = messages_pb2.Evaluation(rows=1)
    await opened.a.say(outcome=fleet_pb2.TaskOutcome(task_id=opened.task.task_id, evaluation=evaluation))
    assert (await opened.a.next_receipt()).status == REFUSED
    assert opened.status() == "assigned"


async def test_strange_figures_neither_stop_a_round_nor_a_restart(tmp_path: Path) -> None:
    figures = [messages_pb2.Metric(name="loss", value=value) for value in (float("nan"), float("inf"))]
    async with coordinating(tmp_path) as coordinator, EchoAgent(coordinator.address, "a") as a:
        job = await coordinator.submit(echo_job(rounds=2), evaluated=True)
        task = await a.next_task()
        await a.say(progress=fleet_pb2.TaskProgress(task_id=task.task_id, stage=fleet_pb2.TaskStage.ValueType(99), loss=float("nan")))
        data = await a.trained(task)
        report = messages_pb2.UpdateReport(metrics=figures, seconds=figures)
        assert (await a.upload(task, data, header=a.header(task, data, report=report))).status == ACCEPTED
        measured = messages_pb2.Evaluation(metrics=figures, rows=2**64 - 1)
        await a.say(outcome=fleet_pb2.TaskOutcome(task_id=(await a.next_task()).task_id, evaluation=measured))
        assert (await a.next_receipt()).status == ACCEPTED
        await a.next_task()
        view = (await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id="last"))).job
        assert view.rounds_committed == 1
    async with coordinating(tmp_path) as coordinator:
        assert coordinator.engine.jobs[job.job_id].machine.committed == 1


# --- bulk streams


async def test_a_digest_that_is_none_names_nothing(opened: Round) -> None:
    for digest in ("", "../../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", "/" + "0" * 63, "é" * 64):
        assert await code_of(opened.a.download(digest)) == Status.INVALID_ARGUMENT
        header = opened.a.header(opened.task, opened.data)
        header.blob.digest = digest
        assert await code_of(opened.a.upload(opened.task, opened.data, header=header)) == Status.INVALID_ARGUMENT
    assert opened.status() == "assigned"


async def test_an_unknown_blob_and_an_offset_beyond_one_are_told_apart(opened: Round) -> None:
    assert await code_of(opened.a.download("0" * 64)) == Status.NOT_FOUND
    digest, size = opened.task.state.digest, opened.task.state.size_bytes
    assert await code_of(opened.a.download(digest, size + 1)) == Status.OUT_OF_RANGE
    assert await code_of(opened.a.download(digest, 2**64 - 1)) == Status.OUT_OF_RANGE
    whole = await opened.a.download(digest)
    assert await opened.a.download(digest, 1000) == whole[1000:]
    assert await opened.a.download(digest, size) == b""


async def test_an_upload_must_begin_with_its_header(opened: Round) -> None:
    async def headless() -> AsyncIterator[blob_pb2.UploadRequest]:
        yield blob_pb2.UploadRequest(chunk=chunks(opened.data, 0, 100)[0])

    async def empty() -> AsyncIterator[blob_pb2.UploadRequest]:
        for nothing in list[blob_pb2.UploadRequest]():
            yield nothing

    assert await code_of(opened.a.stream(headless())) == Status.INVALID_ARGUMENT
    assert await code_of(opened.a.stream(empty())) == Status.INVALID_ARGUMENT


@pytest.mark.parametrize("damage", ["checksum", "gap", "past the end", "empty", "too large a chunk"])
async def test_a_damaged_chunk_ends_the_stream_and_a_good_one_goes_on_from_there(opened: Round, damage: str) -> None:
    first, second, *_ = chunks(opened.data, 0, len(opened.data))
    if damage == "checksum":
        second.crc32 ^= 1
    elif damage == "gap":
        second = chunks(opened.data, second.offset + 1, len(opened.data))[0]
    elif damage == "past the end":
        second.offset = len(opened.data) - 1
    elif damage == "empty":
        second.data = b""
    else:
        second.data += bytes((1 << 20) + 1)

    async def requests() -> AsyncIterator[blob_pb2.UploadRequest]:
        yield blob_pb2.UploadRequest(header=opened.a.header(opened.task, opened.data), chunk=first)
        yield blob_pb2.UploadRequest(chunk=second)

    assert await code_of(opened.a.stream(requests())) == Status.INVALID_ARGUMENT
    held = (await opened.a.status(opened.task, opened.data)).offset
    assert held == len(first.data)
    assert (await opened.a.upload(opened.task, opened.data, offset=held)).status == ACCEPTED


async def test_bytes_of_another_digest_are_thrown_away(coordinator: Coordinator, opened: Round) -> None:
    before = coordinator.blobs()
    header = opened.a.header(opened.task, opened.data)
    header.blob.digest = blake3(b"other").hexdigest()
    assert await code_of(opened.a.upload(opened.task, opened.data, header=header)) == Status.INVALID_ARGUMENT
    assert coordinator.spooled() == []
    assert coordinator.blobs() == before
    assert opened.status() == "assigned"


@pytest.mark.parametrize("size_bytes", [0, 1 << 62, 2**64 - 1])
async def test_an_absurd_size_is_refused_before_anything_is_taken(coordinator: Coordinator, opened: Round, size_bytes: int) -> None:
    header = opened.a.header(opened.task, opened.data)
    header.blob.size_bytes = size_bytes
    assert await code_of(opened.a.upload(opened.task, opened.data, header=header)) == Status.INVALID_ARGUMENT
    assert coordinator.spooled() == []


def tensors_of(**changes: object) -> bytes:
    """An update of one tensor; the honest one is echo.00000, F32, (5242,)."""
    name, dtype = str(changes.get("name", "echo.00000")), str(changes.get("dtype", "F32"))
    shape = cast("tuple[int, ...]", changes.get("shape", (5242,)))
    value = float(str(changes.get("value", 1.0)))
    words = {"F32": "<f4", "F64": "<f8", "I32": "<i4"}
    data: bytes = np.full(shape, value, "<f8").astype(words[dtype]).tobytes()
    kind = str(changes.get("kind", "state"))
    metadata = {"fleetune.update": kind} if kind else {}
    return codec.build_header(codec.pack([(name, dtype, shape)]), metadata) + data


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"name": "evil"}, "model", "'evil'"),
        ({"shape": (5241,)}, "model", "[5241]"),
        ({"shape": (2, 2621)}, "model", "[2, 2621]"),
        ({"dtype": "F64"}, "model", "F64"),
        ({"dtype": "I32"}, "model", "I32"),
        ({"kind": "gradient"}, "model", "holds gradients; deltas or states are asked for"),
        ({"kind": "sum"}, "model", "'sum'"),
        ({"kind": ""}, "model", "fleetune.update"),
        ({"value": float("nan")}, "not_finite", "nan"),
        ({"value": float("inf")}, "not_finite", "inf"),
    ],
)
async def test_an_update_that_does_not_fit_is_refused_with_the_reason(
    coordinator: Coordinator, opened: Round, changes: dict[str, object], kind: str, word: str
) -> None:
    await check_refused(coordinator, opened, tensors_of(**changes), kind, word)


async def check_refused(coordinator: Coordinator, opened: Round, data: bytes, kind: str, word: str) -> None:
    before = coordinator.blobs()
    receipt = await opened.a.upload(opened.task, data)
    assert receipt.status == REFUSED
    assert word in receipt.reason
    assert opened.status() == "failed"
    assert opened.job.machine.last_failure is not None
    assert opened.job.machine.last_failure.kind == kind
    while coordinator.blobs() != before:  # noqa: ASYNC110  # cleared away in the background
        await asyncio.sleep(0.01)
    assert coordinator.spooled() == []
    rows = await coordinator.engine._database.read(records.blob_digests)
    assert blake3(data).hexdigest() not in rows
    assert (await opened.a.upload(opened.task, opened.data)).status == LATE


@pytest.mark.parametrize("what", ["noise", "a huge header", "cut short", "trailing bytes"])
async def test_a_file_that_is_no_tensor_file_is_refused(coordinator: Coordinator, opened: Round, what: str) -> None:
    honest = tensors_of()
    data = {
        "noise": os.urandom(5000),
        "a huge header": (1 << 60).to_bytes(8, "little") + honest[8:],
        "cut short": honest[:-1],
        "trailing bytes": honest + b"x",
    }[what]
    await check_refused(coordinator, opened, data, "model", "")


@pytest.mark.parametrize("samples", [0, SAMPLES_MAX + 1, 2**64 - 1])
async def test_an_absurd_weight_is_refused(coordinator: Coordinator, opened: Round, samples: int) -> None:
    header = opened.a.header(opened.task, opened.data)
    header.report.samples = samples
    receipt = await opened.a.upload(opened.task, opened.data, header=header)
    assert receipt.status == REFUSED
    assert str(samples) in receipt.reason


async def test_an_update_for_another_devices_task_is_refused(opened: Round) -> None:
    other = await opened.b.next_task()
    receipt = await opened.a.upload(other, await opened.b.trained(other))
    assert receipt.status == REFUSED
    assert "not this device's" in receipt.reason
    assert opened.status("b") == "assigned"


async def test_the_same_update_twice_counts_once(coordinator: Coordinator, opened: Round) -> None:
    assert (await opened.a.upload(opened.task, opened.data)).status == ACCEPTED
    assert (await opened.a.upload(opened.task, opened.data)).status == DUPLICATE
    assert (await opened.a.status(opened.task, opened.data)).receipt.status == DUPLICATE
    other = await opened.a.upload(opened.task, echoed(opened.data, 5))
    assert other.status == REFUSED
    assert "received before" in other.reason
    await opened.b.answer(await opened.b.next_task())
    await coordinator.ended(opened.job)
    assert [task.update.samples for task in committed(opened.job, 1).trained() if task.update] == [1, 1]
    assert (await opened.a.upload(opened.task, opened.data)).status == DUPLICATE, "also when the round is long over"


async def test_the_same_update_on_two_streams_at_once_counts_once(opened: Round) -> None:
    results = await asyncio.gather(*[opened.a.upload(opened.task, opened.data) for _ in range(4)], return_exceptions=True)
    receipts = [result.status for result in results if isinstance(result, messages_pb2.Receipt)]
    assert receipts.count(ACCEPTED) == 1
    assert set(receipts) <= {ACCEPTED, DUPLICATE}
    assert {e.code() for e in results if isinstance(e, grpc.aio.AioRpcError)} <= {Status.UNAVAILABLE}


async def test_a_cut_upload_is_resumed_where_it_ended(coordinator: Coordinator, opened: Round) -> None:
    middle = 3 * 4096
    assert await code_of(opened.a.upload(opened.task, opened.data, end=middle)) == Status.ABORTED
    assert (await opened.a.status(opened.task, opened.data)).offset == middle
    assert opened.status() == "assigned"
    assert len(coordinator.spooled()) == 1
    assert (await opened.a.upload(opened.task, opened.data, offset=middle)).status == ACCEPTED
    assert coordinator.spooled() == []


async def test_an_upload_whose_connection_dies_frees_its_place(coordinator: Coordinator, opened: Round) -> None:
    never = asyncio.Event()
    begun = asyncio.Event()

    async def stuck() -> AsyncIterator[blob_pb2.UploadRequest]:
        yield blob_pb2.UploadRequest(header=opened.a.header(opened.task, opened.data), chunk=chunks(opened.data, 0, 4096)[0])
        begun.set()
        await never.wait()

    for _ in range(8):  # twice the uploads that are received at once
        begun.clear()
        sending = asyncio.create_task(opened.a.stream(stuck()))
        await begun.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    status = None
    while status is None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            status = (await opened.a.upload(opened.task, opened.data)).status
    assert status == ACCEPTED
    while coordinator.blob_service.receiving:  # noqa: ASYNC110  # a number that nobody announces
        await asyncio.sleep(0.01)


async def test_an_update_of_another_epoch_is_refused(opened: Round) -> None:
    header = opened.a.header(opened.task, opened.data, epoch=99)
    receipt = await opened.a.upload(opened.task, opened.data, header=header)
    assert receipt.status == REFUSED
    assert "epoch 99" in receipt.reason
    assert opened.status() == "assigned"


async def test_a_late_update_is_recorded_once_and_its_bytes_are_not_kept(coordinator: Coordinator, opened: Round) -> None:
    middle = 4096
    assert await code_of(opened.a.upload(opened.task, opened.data, end=middle)) == Status.ABORTED
    await coordinator.control.CancelJob(control_pb2.CancelJobRequest(job_id=opened.job.job_id))
    for _ in range(2):
        assert (await opened.a.status(opened.task, opened.data)).receipt.status == LATE
        assert (await opened.a.upload(opened.task, opened.data, offset=middle)).status == LATE
    row = await coordinator.engine._database.read(lambda c: records.find_update(c, opened.task.task_id))
    assert row is not None
    assert row.status == "late"
    assert coordinator.spooled() == []


# --- operators


async def test_a_job_is_made_once_however_often_it_is_submitted(coordinator: Coordinator) -> None:
    request = control_pb2.SubmitJobRequest(job_toml=echo_job(), submit_id="one-and-the-same")
    answers = await asyncio.gather(*[coordinator.control.SubmitJob(request) for _ in range(5)])
    assert len({answer.job_id for answer in answers}) == 1
    assert len(coordinator.engine.jobs) == 1


@pytest.mark.parametrize("submit_id", ["", "short", "x" * 65])
async def test_a_submit_needs_an_id_of_its_own(coordinator: Coordinator, submit_id: str) -> None:
    request = control_pb2.SubmitJobRequest(job_toml=echo_job(), submit_id=submit_id)
    assert await code_of(coordinator.control.SubmitJob(request)) == Status.INVALID_ARGUMENT


async def test_a_wrong_job_file_comes_back_with_every_complaint(coordinator: Coordinator) -> None:
    request = control_pb2.SubmitJobRequest(job_toml=echo_job(rounds=0, minimum=0), submit_id="a-wrong-job")
    answer = await coordinator.control.SubmitJob(request)
    assert {c.path for c in answer.complaints} == {"rounds.count", "devices.minimum"}
    assert answer.job_id == ""
    assert coordinator.engine.jobs == {}


@pytest.mark.parametrize("name", ["", "nonesuch", "../x", "\x1b[31m"])
async def test_an_unknown_job_is_not_found(coordinator: Coordinator, name: str) -> None:
    assert await code_of(coordinator.control.GetJob(control_pb2.GetJobRequest(job_id=name))) == Status.NOT_FOUND
    watch = coordinator.control.WatchJob(control_pb2.WatchJobRequest(job_id=name))
    assert await code_of(watch.read()) == Status.NOT_FOUND
    assert await code_of(coordinator.control.GetLogs(control_pb2.GetLogsRequest(job_id=name))) == Status.NOT_FOUND


async def test_a_round_that_is_not_there_is_not_found(coordinator: Coordinator) -> None:
    await coordinator.submit(echo_job(), "a-job-of-its-own")
    for request in (
        control_pb2.DescribeAdapterRequest(job_id="last"),
        control_pb2.DescribeAdapterRequest(job_id="last", round=7),
        control_pb2.DescribeAdapterRequest(job_id="last", best=True),
    ):
        assert await code_of(coordinator.control.DescribeAdapter(request)) == Status.NOT_FOUND
    logs = control_pb2.GetLogsRequest(job_id="last", device_name="nobody")
    assert await code_of(coordinator.control.GetLogs(logs)) == Status.NOT_FOUND


async def test_more_log_lines_than_a_message_holds_are_cut_to_the_newest(coordinator: Coordinator) -> None:
    job = await coordinator.submit(echo_job(), "a-job-that-talks")
    lines = [f"{number} " + "\N{PILE OF POO}" * 990 for number in range(2000)]
    rows = [records.LogRow(1.0, job.job_id, 1, "a", line) for line in lines]
    await coordinator.engine._database.write(lambda tx: records.add_logs(tx, rows))
    answer = await coordinator.control.GetLogs(control_pb2.GetLogsRequest(job_id=job.job_id))
    assert answer.lines[-1].text == lines[-1]
    assert 100 < len(answer.lines) < 2000
