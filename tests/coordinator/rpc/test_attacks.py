"""Attacks on a whole coordinator with mutual TLS, by a hand-made client, while an honest device is served."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import pytest_asyncio
from blake3 import blake3
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fleetune.coordinator import descriptors as descriptors_of
from fleetune.coordinator.principal import Principal, Role
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rpc import limits, permissions
from fleetune.v1 import blob_pb2, control_pb2, fleet_pb2, fleet_pb2_grpc, messages_pb2, registry_pb2
from fleetune.wire import frames
from fleetune.wire.answers import Answer
from fleetune.wire.identity import SERVER_NAME
from support.certificates import Authority, Pair
from support.coordinating import echo_job
from support.echo_agent import EchoAgent, chunks
from support.guarded import Guarded, guarding

Status = grpc.StatusCode
WAIT_S = 60.0
FLOOD_S = 400.0
"""For all of a flood that is sent at once; the last of it is answered when a busy machine is through with the rest."""

BOMB_BYTES = 64 << 20
BROKEN_WRITE = Status.INTERNAL
"""What gRPC's client tells of itself where it writes on while the other end has ended the stream; its status is lost then."""


@dataclass
class Scene:
    """Two devices in the open round of a job, and the operators."""

    place: Guarded
    job: LiveJob
    oak: EchoAgent
    elm: EchoAgent
    oaks: Pair
    elms: Pair
    oak_task: messages_pb2.Task
    elm_task: messages_pb2.Task
    admin: Pair


@pytest_asyncio.fixture
async def place(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarding(tmp_path / "state") as guarded:
        yield guarded


@pytest_asyncio.fixture
async def scene(place: Guarded) -> AsyncIterator[Scene]:
    oaks, elms = await place.enrol("oak", "device-oak"), await place.enrol("elm", "device-elm")
    admin = await place.enrol("ann", role=Role.ADMIN)
    async with place.agent(oaks, "oak") as oak, place.agent(elms, "elm") as elm:
        job = await place.submit(echo_job(rounds=1, minimum=2))
        yield Scene(place, job, oak, elm, oaks, elms, await oak.next_task(), await elm.next_task(), admin)


async def code_of(call: Any, within_s: float = WAIT_S) -> grpc.StatusCode:
    try:
        await asyncio.wait_for(call, within_s)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Status.OK


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fleetune.gate"]


# --- at the handshake


def _foreign(own: Authority) -> Pair:
    return Authority("a test's authority").agent("oak", "device-oak")


CERTIFICATES: dict[str, Callable[[Authority], Pair | None]] = {
    "none": lambda _: None,
    "foreign": _foreign,
    "expired": lambda own: own.agent("oak", "device-oak", begins_days=-2, ends_days=-1),
    "not yet valid": lambda own: own.agent("oak", "device-oak", begins_days=1),
    "wrong purpose": lambda own: own.pair(
        "oak", [x509.UniformResourceIdentifier("urn:fleetune:agent:device-oak")], purpose=ExtendedKeyUsageOID.SERVER_AUTH
    ),
}


@pytest.mark.parametrize("kind", CERTIFICATES)
async def test_a_certificate_that_is_not_good_gets_through_no_handshake(
    place: Guarded, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    channel = place.authority.channel(place.address, CERTIFICATES[kind](place.authority))
    with caplog.at_level(logging.WARNING):
        for method in ("/grpc.health.v1.Health/Check", "/fleetune.v1.ControlService/SubmitJob"):
            assert await code_of(channel.unary_unary(method)(b"", timeout=5)) in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)
    await channel.close()
    assert refusals(caplog) == []  # no call has come as far as the gate


async def test_plaintext_on_the_tls_port_is_refused(place: Guarded) -> None:
    opened: Any = grpc.aio.insecure_channel(place.address)
    async with opened as channel:
        assert await code_of(channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=WAIT_S)) == Status.UNAVAILABLE


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_an_old_tls_is_refused(place: Guarded, version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.wait_for(asyncio.open_connection("127.0.0.1", place.running.port, ssl=context), WAIT_S)


async def test_a_certificate_of_the_right_authority_that_is_not_in_the_list_is_refused(
    place: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    forged = place.open(place.authority.operator("mallory", "admin"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await code_of(forged.unary_unary("/fleetune.v1.ControlService/ListJobs")(b"")) == Status.UNAUTHENTICATED
    assert len(refusals(caplog)) == 1
    assert "operator mallory" in refusals(caplog)[0]


# --- every method by every identity


STREAMS_IN = {"FleetService/Session", "BlobService/Upload", "ServerReflection/ServerReflectionInfo"}


async def outcome_of(channel: Any, method: str) -> tuple[grpc.StatusCode, str]:
    """How a call without content ends, or OK with its first answer."""
    if method.endswith(tuple(STREAMS_IN)):
        call: Any = channel.stream_stream(method)(timeout=WAIT_S)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.done_writing()
    else:
        call = channel.unary_stream(method)(b"", timeout=WAIT_S)
    try:
        await call.read()
        return (Status.OK, "") if not call.done() else (await call.code(), await call.details())
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    finally:
        call.cancel()


async def test_every_identity_gets_through_to_exactly_its_methods(place: Guarded) -> None:
    channels = {
        Principal("agent", "oak", "device-oak"): place.open(await place.enrol("oak", "device-oak")),
        **{
            Principal("operator", role.name.lower(), role=role): place.open(await place.enrol(role.name.lower(), role=role))
            for role in (Role.VIEW, Role.OPERATE, Role.ADMIN)
        },
    }
    wrong: list[str] = []
    for principal, channel in channels.items():
        for method in sorted(permissions.RULES):
            code, details = await outcome_of(channel, method)
            refused = " is refused: " in details
            if refused != bool(permissions.objection(principal, method)) or (refused and code != Status.PERMISSION_DENIED):
                wrong.append(f"{principal} {method}: {code.name} {details}")
            if code in (Status.UNIMPLEMENTED, Status.UNKNOWN, Status.INTERNAL) and not method.endswith("Health/List"):
                wrong.append(f"{principal} {method}: {code.name} {details}")
    assert wrong == []


# --- what is another device's


async def hello_code(place: Guarded, pair: Pair, name: str, device_id: str) -> grpc.StatusCode:
    call: Any = fleet_pb2_grpc.FleetServiceStub(place.open(pair)).Session(timeout=WAIT_S)
    hello = fleet_pb2.Hello(protocol_major=1, device_id=device_id, device_name=name, instance_id="run-2")
    told = Answer(call)  # it may be refused before the hello is out
    try:
        await told.heard(call.write(fleet_pb2.SessionRequest(hello=hello)))
        assert (await told.heard(call.read())) is not grpc.aio.EOF
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        call.cancel()
    return Status.OK


@pytest.mark.parametrize(
    ("name", "device_id"), [("oak", "device-elm"), ("elm", "device-oak"), ("oak", "device-oak"), ("elm", "device-new")]
)
async def test_a_hello_must_be_of_the_certificates_name_and_id(scene: Scene, name: str, device_id: str) -> None:
    assert await hello_code(scene.place, scene.elms, name, device_id) == Status.PERMISSION_DENIED
    assert scene.place.running.fleet.lines.keys() == {"device-oak", "device-elm"}
    assert not scene.oak.ended.is_set()


async def test_no_field_of_the_blob_service_takes_another_devices_id_or_task(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    data = await scene.elm.trained(scene.elm_task)
    foreign = [
        {"device_id": "device-oak", "task_id": scene.oak_task.task_id},
        {"device_id": "device-elm", "task_id": scene.oak_task.task_id},
        {"device_id": "device-oak", "task_id": scene.elm_task.task_id},
        {"device_id": "", "task_id": scene.elm_task.task_id},
        {"device_id": "device-elm", "task_id": f"{scene.oak_task.task_id}/1"},
    ]
    blobs = scene.elm._blobs
    with caplog.at_level(logging.WARNING):
        for fields in foreign:
            header = scene.elm.header(scene.elm_task, data)
            header.device_id, header.task_id = fields["device_id"], fields["task_id"]
            assert await code_of(scene.elm.upload(scene.elm_task, data, header=header)) == Status.PERMISSION_DENIED, fields
            status = blob_pb2.UploadStatusRequest(device_id=header.device_id, task_id=header.task_id, blob=header.blob, epoch=1)
            assert await code_of(blobs.UploadStatus(status)) == Status.PERMISSION_DENIED, fields
    assert len(refusals(caplog)) == 4  # two methods, two reasons
    open_round = scene.job.machine.round
    assert open_round is not None
    assert {task.status for task in open_round.tasks.values()} == {"assigned"}
    assert list((scene.place.state_dir / "spool").iterdir()) == []


async def test_no_message_of_a_session_moves_another_devices_task(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    theirs = scene.oak_task.task_id
    outcomes: list[dict[str, Any]] = [
        {"failure": messages_pb2.Failure(message="no")},
        {"evaluation": messages_pb2.Evaluation(rows=5)},
        {"refusal": fleet_pb2.TaskRefusal(reason="no")},
    ]
    with caplog.at_level(logging.WARNING):
        for outcome in outcomes:
            await scene.elm.say(outcome=fleet_pb2.TaskOutcome(task_id=theirs, lease=scene.oak_task.lease, **outcome))
            assert (await scene.elm.next_receipt()).status == messages_pb2.RECEIPT_STATUS_REFUSED
        await scene.elm.say(
            progress=fleet_pb2.TaskProgress(task_id=theirs, stage=fleet_pb2.TASK_STAGE_UPLOADING, done=9, total=9, loss=1.0)
        )
        await scene.elm.say(log=fleet_pb2.TaskLog(task_id=theirs, lines=["not oak's"]))
        await scene.elm.say(outcome=fleet_pb2.TaskOutcome(task_id=theirs, refusal=fleet_pb2.TaskRefusal()))
        await scene.elm.next_receipt()  # all before it has been read
    entry = scene.job.machine.open_task(theirs)
    assert entry is not None
    assert entry.status == "assigned"
    assert scene.job.progress.get(theirs) is None or scene.job.progress[theirs].done == 0
    logs = await scene.place.control(scene.admin).GetLogs(control_pb2.GetLogsRequest(job_id=scene.job.job_id))
    assert list(logs.lines) == []
    assert len(refusals(caplog)) == 1


async def test_a_device_fetches_only_what_its_open_task_refers_to(scene: Scene) -> None:
    state = scene.elm_task.state.digest
    assert await scene.elm.download(state)
    update = await scene.oak.trained(scene.oak_task)
    await scene.oak.upload(scene.oak_task, update)
    theirs = blake3(update).hexdigest()
    assert scene.place.running.engine.blobs.has(theirs)
    assert await code_of(scene.elm.download(theirs)) == Status.PERMISSION_DENIED
    assert await code_of(scene.elm.download("0" * 64)) == Status.PERMISSION_DENIED
    # Its own task is done: it has no need of the state any more.
    assert await code_of(scene.oak.download(state)) == Status.PERMISSION_DENIED


async def test_operators_fetch_adapters_and_no_devices_update(scene: Scene) -> None:
    update = await scene.oak.trained(scene.oak_task)
    await scene.oak.upload(scene.oak_task, update)
    viewer = scene.place.open(await scene.place.enrol("vic", role=Role.VIEW))
    for channel in (viewer, scene.place.open(scene.admin)):
        call = frames.download(channel)(blob_pb2.DownloadRequest(digest=blake3(update).hexdigest()))
        assert await code_of(call.read()) == Status.PERMISSION_DENIED
    await scene.elm.upload(scene.elm_task, await scene.elm.trained(scene.elm_task))
    while not scene.job.ended:
        await asyncio.wait_for(scene.job.changed.wait(), WAIT_S)
    described = await scene.place.control(scene.admin).DescribeAdapter(control_pb2.DescribeAdapterRequest(job_id="last"))
    [blob] = [file.blob for file in described.files if file.blob.digest]
    call = frames.download(viewer)(blob_pb2.DownloadRequest(digest=blob.digest))
    first = await call.read()
    assert isinstance(first, frames.Download)
    assert first.size_bytes == blob.size_bytes
    call.cancel()


async def test_the_audit_log_names_the_operator(scene: Scene) -> None:
    control = scene.place.control(scene.admin)
    await control.CancelJob(control_pb2.CancelJobRequest(job_id=scene.job.job_id))
    entries = (await control.ListAudit(control_pb2.ListAuditRequest())).entries
    assert [e.actor.split(" ipv4:")[0] for e in entries if e.action == "cancel"] == ["operator ann"]


# --- revocation


async def revoke(place: Guarded, admin: Pair, name: str, kind: Any = registry_pb2.IDENTITY_KIND_AGENT) -> int:
    answer = await place.registry(admin).RevokeIdentity(registry_pb2.RevokeIdentityRequest(kind=kind, name=name))
    return answer.streams


async def test_a_revoked_device_is_out_at_once_with_a_session_and_an_upload_under_way(scene: Scene) -> None:
    data = await scene.oak.trained(scene.oak_task)
    begun, never = asyncio.Event(), asyncio.Event()

    async def stuck() -> AsyncIterator[blob_pb2.UploadRequest]:
        yield blob_pb2.UploadRequest(header=scene.oak.header(scene.oak_task, data), chunk=chunks(data, 0, 4096)[0])
        begun.set()
        await never.wait()

    upload = asyncio.create_task(code_of(scene.oak.stream(stuck())))
    await begun.wait()
    while not scene.place.running.blob_service.receiving:  # noqa: ASYNC110  # a number that nobody announces
        await asyncio.sleep(0.01)
    sending = asyncio.create_task(beating(scene.oak))
    assert await revoke(scene.place, scene.admin, "oak") == 2
    await asyncio.wait_for(scene.oak.ended.wait(), WAIT_S)
    assert await scene.oak._call.code() in (Status.PERMISSION_DENIED, BROKEN_WRITE)
    sending.cancel()
    never.set()
    assert await upload == Status.PERMISSION_DENIED
    # On the connection that is still there, by each of its methods, and with a heartbeat that comes after it.
    assert await code_of(scene.oak.status(scene.oak_task, data)) == Status.UNAUTHENTICATED
    assert await code_of(scene.oak.download(scene.oak_task.state.digest)) == Status.UNAUTHENTICATED
    assert await hello_code(scene.place, scene.oaks, "oak", "device-oak") == Status.UNAUTHENTICATED
    assert scene.place.running.fleet.lines.keys() == {"device-elm"}
    assert not scene.elm.ended.is_set()


async def beating(agent: EchoAgent) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for sequence in range(10_000):
            await agent.say(heartbeat=fleet_pb2.Heartbeat(sequence=sequence))
            await asyncio.sleep(0.005)


async def test_a_revoked_device_stays_out_over_restarts(tmp_path: Path) -> None:
    async with guarding(tmp_path / "state") as place:
        oaks, admin = await place.enrol("oak", "device-oak"), await place.enrol("ann", role=Role.ADMIN)
        assert await hello_code(place, oaks, "oak", "device-oak") == Status.OK
        await revoke(place, admin, "oak")
    for _ in range(3):
        async with guarding(tmp_path / "state") as place:
            assert await hello_code(place, oaks, "oak", "device-oak") == Status.UNAUTHENTICATED
            assert await code_of(place.control(admin).ListJobs(control_pb2.ListJobsRequest())) == Status.OK


async def test_a_revoked_operators_watch_ends_and_an_admin_may_revoke_itself(scene: Scene) -> None:
    viewers = await scene.place.enrol("vic", role=Role.VIEW)
    watch = scene.place.control(viewers).WatchJob(control_pb2.WatchJobRequest(job_id="last"))
    await watch.read()
    assert await revoke(scene.place, scene.admin, "vic", registry_pb2.IDENTITY_KIND_OPERATOR) == 1
    assert await code_of(watch.read()) == Status.PERMISSION_DENIED
    assert await revoke(scene.place, scene.admin, "ann", registry_pb2.IDENTITY_KIND_OPERATOR) == 0
    assert await code_of(scene.place.control(scene.admin).ListJobs(control_pb2.ListJobsRequest())) == Status.UNAUTHENTICATED


# --- too much, too long, not what it says


async def test_an_update_far_larger_than_its_job_is_refused_before_any_disk_is_taken(scene: Scene) -> None:
    header = scene.elm.header(scene.elm_task, b"x")
    header.blob.size_bytes = 3 << 30
    assert await code_of(scene.elm.upload(scene.elm_task, b"", header=header)) == Status.INVALID_ARGUMENT
    assert list((scene.place.state_dir / "spool").iterdir()) == []


@pytest.mark.parametrize(
    "head",
    [
        (2**63).to_bytes(8, "little"),
        (1 << 21).to_bytes(8, "little") + b" " * 1000,
        (3000).to_bytes(8, "little") + b"[" * 3000,
        (16).to_bytes(8, "little") + b'{"a":1,"a":2}   ',
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    ],
    ids=["length 2^63", "header over its bound", "deep JSON", "a key twice", "pickle"],
)
async def test_an_absurd_manifest_is_refused_and_ends_that_devices_task_alone(scene: Scene, head: bytes) -> None:
    receipt = await scene.elm.upload(scene.elm_task, head)
    assert receipt.status == messages_pb2.RECEIPT_STATUS_REFUSED
    entry = scene.job.machine.open_task(scene.oak_task.task_id)
    assert entry is not None
    assert entry.status == "assigned"


async def test_an_endless_upload_ends_at_the_size_that_it_declared(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    data = await scene.elm.trained(scene.elm_task)
    sent = 0

    async def endless() -> AsyncIterator[blob_pb2.UploadRequest]:
        nonlocal sent
        yield blob_pb2.UploadRequest(header=scene.elm.header(scene.elm_task, data))
        while True:
            yield blob_pb2.UploadRequest(chunk=blob_pb2.Chunk(offset=sent, data=bytes(65536), crc32=0xD7978EEB))
            sent += 65536

    assert await code_of(scene.elm.stream(endless())) in (Status.INVALID_ARGUMENT, BROKEN_WRITE)
    assert sent < 64 << 20
    assert len(refusals(caplog)) == 1
    assert "was declared with" in refusals(caplog)[0]


async def test_an_upload_of_messages_without_bytes_ends(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    data = await scene.elm.trained(scene.elm_task)

    async def empty() -> AsyncIterator[blob_pb2.UploadRequest]:
        yield blob_pb2.UploadRequest(header=scene.elm.header(scene.elm_task, data))
        while True:
            yield blob_pb2.UploadRequest()

    assert await code_of(scene.elm.stream(empty())) in (Status.INVALID_ARGUMENT, BROKEN_WRITE)
    assert len(refusals(caplog)) == 1
    assert "holds no bytes" in refusals(caplog)[0]


async def test_one_task_has_one_spool_however_many_updates_are_begun_for_it(scene: Scene) -> None:
    data = await scene.elm.trained(scene.elm_task)
    for number in range(5):
        other = data[:-1] + bytes([number])
        assert await code_of(scene.elm.upload(scene.elm_task, other, end=4096)) == Status.ABORTED
    assert len(list((scene.place.state_dir / "spool").iterdir())) == 1


async def test_a_flood_of_session_messages_is_held_back_and_then_cut(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A machine may be too busy to send faster than is allowed: no time passes for who is held back.
    now_s = asyncio.get_running_loop().time()
    monkeypatch.setattr(scene.place.running.fleet, "_monotonic", lambda: now_s)
    monkeypatch.setattr(limits, "PERSISTS_S", -1.0)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for sequence in range(int(limits.BURST) + 100):
            await scene.elm.say(heartbeat=fleet_pb2.Heartbeat(sequence=sequence))
    await asyncio.wait_for(scene.elm.ended.wait(), WAIT_S)
    assert await scene.elm._call.code() in (Status.RESOURCE_EXHAUSTED, BROKEN_WRITE)
    assert [text for text in refusals(caplog) if "agent elm" in text and "more messages" in text]
    assert not scene.oak.ended.is_set()


async def test_a_lying_and_hostile_hello_is_shown_sober(place: Guarded) -> None:
    pair, admin = await place.enrol("oak", "device-oak"), await place.enrol("ann", role=Role.ADMIN)
    agent = place.agent(pair, "oak")
    hello = agent.hello
    hello.agent_version = "<script>\n\x1b[31m" + "x" * 100_000
    hello.profile.board = "a\nb" + "y" * 1_000_000
    hello.profile.cores = math.nan
    hello.profile.memory_total_bytes = 2**64 - 1
    hello.MergeFromString(b"\xfa\x7f\x83\x80\x06" + bytes(98_307))  # a field that nobody knows
    async with agent:
        await agent.say(heartbeat=fleet_pb2.Heartbeat(sequence=1, cpu_percent=math.inf, temperature_c=math.nan, task_id="z" * 100_000))
        listed = await place.control(admin).ListDevices(control_pb2.ListDevicesRequest())
        while not listed.devices[0].HasField("telemetry"):
            listed = await place.control(admin).ListDevices(control_pb2.ListDevicesRequest())
    [device] = listed.devices
    assert device.ByteSize() < 2000
    assert "\n" not in device.agent_version + device.profile.board
    assert "\x1b" not in device.agent_version
    assert device.profile.cores == 0.0
    assert device.profile.memory_total_bytes == 2**50
    assert device.telemetry.cpu_percent == 100.0
    assert device.telemetry.temperature_c == -100.0
    assert device.task_id == ""


# --- floods of those who are nobody


async def garbage(port: int, data: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            await asyncio.wait_for(reader.read(), WAIT_S)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors are counted by /proc")
async def test_an_honest_device_is_served_through_every_kind_of_flood_and_nothing_is_left(place: Guarded) -> None:
    port = place.running.port
    oaks, elms = await place.enrol("oak", "device-oak"), await place.enrol("elm", "device-elm")
    flooding = place.open(elms)
    check = flooding.unary_unary("/grpc.health.v1.Health/Check")
    assert await code_of(check(b"")) == Status.OK

    async def served() -> None:
        job = await place.submit(echo_job(rounds=2))
        while not job.ended:
            await asyncio.wait_for(job.changed.wait(), WAIT_S)
        assert job.machine.status == "completed"

    async def idle_sockets() -> None:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(500)]
        try:
            await served()
        finally:
            for one in held:
                one.close()

    async def strange_bytes() -> None:
        kinds = (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            os.urandom(5000),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\xff\xff" + bytes(5000),
        )
        await asyncio.gather(served(), *[garbage(port, kind) for kind in kinds for _ in range(10)])

    async def resets() -> None:
        async def reset() -> None:
            for _ in range(2000):
                flooding.stream_stream("/fleetune.v1.FleetService/Session")().cancel()
                await asyncio.sleep(0)

        await asyncio.gather(served(), reset())

    async def burst() -> None:
        calls = [code_of(check(b""), FLOOD_S) for _ in range(5000)]
        _, *codes = await asyncio.gather(served(), *calls)
        # The flooding connection itself may be told to go away.
        assert set(codes) <= {Status.OK, Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE}
        assert Status.OK in codes

    async with place.agent(oaks, "oak") as oak:
        oak.serve()
        await served()
        before = descriptors()
        floods: list[Callable[[], Awaitable[None]]] = [idle_sockets, strange_bytes, resets, burst]
        for flood in floods:
            await flood()
        for _ in range(3000):
            if descriptors() <= before + 2 and place.running.gate.open_calls() <= 1:
                break
            await asyncio.sleep(0.01)
        assert descriptors() <= before + 2
        assert place.running.gate.open_calls() == 1  # the honest device's session


async def test_a_bomb_of_zeros_and_a_flood_of_metadata_are_refused_before_they_take_memory(place: Guarded) -> None:
    pair = await place.enrol("ann", role=Role.ADMIN)
    method = "/fleetune.v1.ControlService/ValidateJob"
    process = psutil.Process()
    small = place.open(pair).unary_unary(method)
    assert await code_of(small(b"", timeout=WAIT_S)) == Status.OK
    before = process.memory_info().rss
    credentials = grpc.ssl_channel_credentials(place.authority.root, pair.key, pair.certificate)
    options = [("grpc.ssl_target_name_override", SERVER_NAME), ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    zeros = bytes(BOMB_BYTES)  # 64 KiB on the wire
    async with grpc.aio.secure_channel(place.address, credentials, options=options) as opened:
        raw: Any = opened.unary_unary(method)  # Any: raw calls have no types
        assert await code_of(raw(zeros, timeout=WAIT_S, compression=grpc.Compression.Gzip)) == Status.RESOURCE_EXHAUSTED
    # This process holds the zeros, and is the client, too.
    assert process.memory_info().rss - before < 3 * BOMB_BYTES
    for metadata in ([("x", "y" * 40_000)], [(f"x{number}", "y" * 100) for number in range(400)]):
        assert await code_of(small(b"", metadata=metadata, timeout=WAIT_S)) == Status.RESOURCE_EXHAUSTED
    assert await code_of(small(b"", timeout=WAIT_S)) == Status.OK


async def test_more_connections_than_the_process_can_hold_are_not_taken_and_those_that_are_there_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors_of, "connections_max", lambda: 12)
    async with guarding(tmp_path / "state") as place:
        pair = await place.enrol("oak", "device-oak")
        check = place.open(pair).unary_unary("/grpc.health.v1.Health/Check")
        assert await code_of(check(b"")) == Status.OK
        held = [socket.create_connection(("127.0.0.1", place.running.port)) for _ in range(40)]
        async with place.authority.channel(place.address, pair) as late:
            # By now the kernel has taken them all, and the server the first of them.
            assert await code_of(late.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=2)) in (
                Status.UNAVAILABLE,
                Status.DEADLINE_EXCEEDED,
            )
        assert await code_of(check(b"")) == Status.OK
        for one in held:
            one.close()
        async with place.authority.channel(place.address, pair) as late:
            again = late.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=WAIT_S, wait_for_ready=True)
            assert await code_of(again) == Status.OK
