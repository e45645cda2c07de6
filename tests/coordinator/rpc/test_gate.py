"""The gate in front of a real server with mutual TLS, and small handlers of all four kinds behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from fleetune.coordinator.principal import LOCAL, Principal, Role
from fleetune.coordinator.rpc import gate, permissions
from fleetune.coordinator.rpc.gate import Gate
from fleetune.v1 import blob_pb2, blob_pb2_grpc, control_pb2, control_pb2_grpc, fleet_pb2, fleet_pb2_grpc, registry_pb2
from fleetune.wire import channel, frames
from fleetune.wire.answers import Answer
from support.certificates import Authority, Pair

Status = grpc.StatusCode
HealthStub: Any = health_pb2_grpc.HealthStub  # Any: no types of their own
ReflectionStub: Any = reflection_pb2_grpc.ServerReflectionStub
WAIT_S = 60.0


class Fleet(fleet_pb2_grpc.FleetServiceServicer):
    """Echoes each heartbeat, and keeps what it was told about its callers."""

    def __init__(self) -> None:
        self.callers: list[Principal] = []
        self.ended: list[str] = []

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        self.callers.append(gate.caller())
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                await context.write(
                    fleet_pb2.SessionResponse(heartbeat_reply=fleet_pb2.HeartbeatReply(sequence=message.heartbeat.sequence))
                )
        finally:
            self.ended.append(gate.caller().name)


class Blobs:
    """A raw upload that reads all, and a raw download that never ends."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.writing = asyncio.Event()
        self.about_to_write: Callable[[], object] = object

    async def Upload(self, request_iterator: Any, context: Any) -> blob_pb2.UploadResponse:
        while (await context.read()) is not grpc.aio.EOF:
            self.arrived.set()
        return blob_pb2.UploadResponse()

    async def UploadStatus(self, request: blob_pb2.UploadStatusRequest, context: Any) -> blob_pb2.UploadStatusResponse:
        return blob_pb2.UploadStatusResponse(offset=len(request.task_id))

    async def Probe(self, request_iterator: Any, context: Any) -> blob_pb2.ProbeResponse:
        return blob_pb2.ProbeResponse()

    async def Download(self, request: blob_pb2.DownloadRequest, context: Any) -> None:
        while True:
            self.about_to_write()
            await context.write(frames.encode_download(frames.Download(frames.chunk_of(0, bytes(1000)), 0)))
            self.writing.set()
            await asyncio.sleep(0)


class Control(control_pb2_grpc.ControlServiceServicer):
    """All but three methods are missing, as the generated code leaves them."""

    async def ServerInfo(self, request: control_pb2.ServerInfoRequest, context: Any) -> control_pb2.ServerInfoResponse:
        return control_pb2.ServerInfoResponse(version=str(gate.caller()))

    async def ListAudit(self, request: control_pb2.ListAuditRequest, context: Any) -> control_pb2.ListAuditResponse:
        gate.refuse("it is a test")
        return control_pb2.ListAuditResponse()

    def __init__(self) -> None:
        self.about_to_write: Callable[[], object] = object

    async def WatchJob(self, request: control_pb2.WatchJobRequest, context: Any) -> AsyncIterator[control_pb2.WatchJobResponse]:
        self.about_to_write()
        yield control_pb2.WatchJobResponse()
        await asyncio.Event().wait()


class Place:
    """A server behind a gate, its authority, and channels to it."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.refused: dict[str, str] = {}
        """Name -> why the caller does not stand."""
        self.wall: Callable[[], float] = time.time
        """The clock by which the gate goes; TLS goes by the machine's."""
        self.fleet, self.blobs = Fleet(), Blobs()
        self.control = Control()  # type: ignore[abstract]  # that is what is tested
        self.gate = Gate(lambda p: self.refused.get(p.name, ""), plaintext=False, wall=lambda: self.wall())
        self.address = ""
        self._channels: list[grpc.aio.Channel] = []

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Place]:
        server = grpc.aio.server(interceptors=[self.gate], options=channel.server_options())
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self.fleet, server)
        frames.add_to_server(self.blobs, server)
        control_pb2_grpc.add_ControlServiceServicer_to_server(self.control, server)
        health_service = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
        reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
        self.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', self.authority.server_credentials())}"
        await server.start()
        await health_service.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            yield self
        finally:
            for opened in self._channels:
                await opened.close()
            await server.stop(grace=0)

    def open(self, pair: Pair) -> Any:  # Any: raw calls have no types
        self._channels.append(self.authority.channel(self.address, pair))
        return self._channels[-1]


AUTHORITY = Authority()


@pytest_asyncio.fixture
async def place() -> AsyncIterator[Place]:
    async with Place(AUTHORITY).serving() as served:
        yield served


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await asyncio.wait_for(call, WAIT_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Status.OK


async def talking(opened: Any) -> Any:
    """A session that is known to be open at the other end."""
    call: Any = fleet_pb2_grpc.FleetServiceStub(opened).Session()
    told = Answer(call)  # it may be refused before it has said anything
    await told.heard(call.write(fleet_pb2.SessionRequest(heartbeat=fleet_pb2.Heartbeat(sequence=7))))
    answer: Any = await asyncio.wait_for(told.heard(call.read()), WAIT_S)
    assert answer.heartbeat_reply.sequence == 7
    return call


async def until_none_is_open(place: Place) -> None:
    while place.gate.open_calls():  # noqa: ASYNC110  # a number that nobody announces
        await asyncio.sleep(0.01)


async def test_a_handler_knows_who_calls(place: Place) -> None:
    pair = AUTHORITY.agent("oak", "device-oak")
    call = await talking(place.open(pair))
    assert place.fleet.callers == [Principal("agent", "oak", "device-oak", fingerprint=pair.fingerprint)]
    call.cancel()


async def test_raw_handlers_health_and_reflection_work_behind_the_gate(place: Place) -> None:
    opened = place.open(AUTHORITY.agent("oak", "device-oak"))
    blobs = blob_pb2_grpc.BlobServiceStub(opened)
    assert (await blobs.UploadStatus(blob_pb2.UploadStatusRequest(task_id="abc"))).offset == 3
    upload = frames.upload(opened)()
    await upload.write(frames.encode_upload(frames.Upload(blob_pb2.UploadHeader(task_id="t"))))
    await upload.done_writing()
    assert await upload == blob_pb2.UploadResponse()
    download = blobs.Download(blob_pb2.DownloadRequest())
    assert len((await download.read()).chunk.data) == 1000
    download.cancel()
    checked = await HealthStub(opened).Check(health_pb2.HealthCheckRequest())
    assert checked.status == health_pb2.HealthCheckResponse.SERVING
    asking = ReflectionStub(opened).ServerReflectionInfo()
    await asking.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert (await asking.read()).HasField("list_services_response")
    asking.cancel()


async def test_cut_ends_every_kind_of_open_call_of_one_principal_and_of_nobody_else(place: Place) -> None:
    oak, elm = place.open(AUTHORITY.agent("oak", "device-oak")), place.open(AUTHORITY.agent("elm", "device-elm"))
    theirs = await talking(elm)
    session = await talking(oak)
    upload = frames.upload(oak)()
    await upload.write(frames.encode_upload(frames.Upload(blob_pb2.UploadHeader(task_id="t"))))
    await asyncio.wait_for(place.blobs.arrived.wait(), WAIT_S)
    download = blob_pb2_grpc.BlobServiceStub(oak).Download(blob_pb2.DownloadRequest())
    await download.read()
    watch = HealthStub(oak).Watch(health_pb2.HealthCheckRequest())
    await watch.read()

    assert place.gate.cut("agent", "oak") == 4
    assert place.gate.cut("agent", "oak") == 0

    with contextlib.suppress(grpc.aio.AioRpcError):
        while True:  # a status comes behind what was sent before it
            await asyncio.wait_for(download.read(), WAIT_S)
    for call in (session, upload, download, watch):
        assert await asyncio.wait_for(call.code(), WAIT_S) == Status.PERMISSION_DENIED
        assert "revoked" in await call.details()
    assert place.fleet.ended == ["oak"]
    await theirs.write(fleet_pb2.SessionRequest(heartbeat=fleet_pb2.Heartbeat(sequence=8)))
    assert (await theirs.read()).heartbeat_reply.sequence == 8
    theirs.cancel()


async def test_cut_does_not_wait_for_one_that_reads_nothing(place: Place) -> None:
    opened = place.open(AUTHORITY.agent("oak", "device-oak"))
    download = blob_pb2_grpc.BlobServiceStub(opened).Download(blob_pb2.DownloadRequest())
    await download.read()
    while place.blobs.writing.is_set():  # until flow control holds the server
        place.blobs.writing.clear()
        await asyncio.sleep(0.2)
    assert place.gate.cut("agent", "oak") == 1
    await until_none_is_open(place)
    download.cancel()


async def test_an_operators_watch_is_cut_by_its_own_kind_and_name_alone(place: Place) -> None:
    opened = place.open(AUTHORITY.operator("oak", "view"))
    watch = control_pb2_grpc.ControlServiceStub(opened).WatchJob(control_pb2.WatchJobRequest())
    await watch.read()
    assert place.gate.cut("agent", "oak") == 0
    assert place.gate.cut("operator", "oak") == 1
    assert await asyncio.wait_for(watch.code(), WAIT_S) == Status.PERMISSION_DENIED


async def test_a_watch_that_is_cut_while_its_first_answer_is_on_its_way_is_told_why(place: Place) -> None:
    loop = asyncio.get_running_loop()
    place.control.about_to_write = lambda: loop.call_soon(place.gate.cut, "operator", "oak")
    watch = control_pb2_grpc.ControlServiceStub(place.open(AUTHORITY.operator("oak", "view"))).WatchJob(control_pb2.WatchJobRequest())
    await watch.read()
    assert await asyncio.wait_for(watch.code(), WAIT_S) == Status.PERMISSION_DENIED
    assert "revoked" in await watch.details()


async def test_a_handler_that_is_cut_in_its_own_first_write_ends_at_the_other_end_too(place: Place) -> None:
    loop = asyncio.get_running_loop()
    place.blobs.about_to_write = lambda: loop.call_soon(place.gate.cut, "agent", "oak")
    download = blob_pb2_grpc.BlobServiceStub(place.open(AUTHORITY.agent("oak", "device-oak"))).Download(blob_pb2.DownloadRequest())
    await download.read()
    assert await asyncio.wait_for(download.code(), WAIT_S) == Status.PERMISSION_DENIED
    assert "revoked" in await download.details()


async def test_who_does_not_stand_is_refused_on_a_connection_that_is_open_already(place: Place) -> None:
    stub = control_pb2_grpc.ControlServiceStub(place.open(AUTHORITY.operator("ann")))
    assert (await stub.ServerInfo(control_pb2.ServerInfoRequest())).version == "operator ann"
    place.refused["ann"] = "its certificate was revoked"
    with pytest.raises(grpc.aio.AioRpcError, match="revoked") as caught:
        await stub.ServerInfo(control_pb2.ServerInfoRequest())
    assert caught.value.code() == Status.UNAUTHENTICATED


async def test_a_certificate_that_runs_out_ends_open_streams_and_refuses_new_calls(place: Place) -> None:
    pair = AUTHORITY.agent("oak", "device-oak")
    end_unix_s = x509.load_pem_x509_certificate(pair.certificate).not_valid_after_utc.timestamp()
    place.wall = lambda: end_unix_s - 0.2  # however long the handshake takes
    session = fleet_pb2_grpc.FleetServiceStub(place.open(pair)).Session()
    assert await asyncio.wait_for(session.code(), WAIT_S) == Status.UNAVAILABLE
    assert await session.details() == "Session is ended: its certificate has run out"
    place.wall = lambda: end_unix_s + 31 * 86400.0
    other = place.open(AUTHORITY.agent("elm", "device-elm"))
    assert await code_of(HealthStub(other).Check(health_pb2.HealthCheckRequest())) == Status.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("name", "alternatives"),
    [
        ("oak", []),
        ("oak", [x509.DNSName("oak.example")]),
        ("oak", [x509.DNSName("urn:fleetune:operator:admin")]),
        ("oak", [x509.UniformResourceIdentifier("urn:fleetune:operator:root")]),
        ("oak", [x509.UniformResourceIdentifier("urn:fleetune:agent:x"), x509.UniformResourceIdentifier("urn:fleetune:operator:view")]),
        ("o a k", [x509.UniformResourceIdentifier("urn:fleetune:operator:view")]),
        ("../oak", [x509.UniformResourceIdentifier("urn:fleetune:agent:device-oak")]),
    ],
)
async def test_a_sound_certificate_that_names_nobody_of_a_fleet_is_refused(
    place: Place, name: str, alternatives: list[x509.GeneralName]
) -> None:
    opened = place.open(AUTHORITY.pair(name, alternatives))
    assert await code_of(HealthStub(opened).Check(health_pb2.HealthCheckRequest())) == Status.UNAUTHENTICATED


async def test_one_caller_has_only_so_many_calls_open_and_others_are_not_concerned(place: Place) -> None:
    oak, elm = place.open(AUTHORITY.agent("oak", "device-oak")), place.open(AUTHORITY.agent("elm", "device-elm"))
    most = permissions.RULES["/fleetune.v1.FleetService/Session"].at_once
    held = [await talking(oak) for _ in range(most)]
    extra = fleet_pb2_grpc.FleetServiceStub(oak).Session()
    assert await asyncio.wait_for(extra.code(), WAIT_S) == Status.RESOURCE_EXHAUSTED
    held.append(await talking(elm))
    held.pop(0).cancel()
    while len(held) <= most:  # until the server has seen the end of the first
        with contextlib.suppress(grpc.aio.AioRpcError):
            held.append(await talking(oak))
    for call in held:
        call.cancel()


async def test_no_call_is_remembered_after_its_end(place: Place) -> None:
    opened = place.open(AUTHORITY.agent("oak", "device-oak"))
    stub = HealthStub(opened)
    await asyncio.gather(*[stub.Check(health_pb2.HealthCheckRequest()) for _ in range(10)])
    (await talking(opened)).cancel()
    await until_none_is_open(place)
    assert place.gate._open == {}


async def test_bytes_that_are_no_message_are_answered_so_and_logged_once(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    opened = place.open(AUTHORITY.operator("ann"))
    call = opened.unary_unary("/fleetune.v1.ControlService/ServerInfo")
    session = place.open(AUTHORITY.agent("oak", "device-oak")).stream_stream("/fleetune.v1.FleetService/Session")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert await code_of(call(b"\xff\xff\xff")) == Status.INVALID_ARGUMENT
            stream = session()
            await stream.write(b"\xff\xff\xff")
            assert await asyncio.wait_for(stream.code(), WAIT_S) == Status.INVALID_ARGUMENT
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 2


async def test_a_refused_request_is_not_even_parsed(place: Place) -> None:
    opened = place.open(AUTHORITY.agent("oak", "device-oak"))
    assert await code_of(opened.unary_unary("/fleetune.v1.ControlService/SubmitJob")(b"\xff\xff\xff")) == Status.PERMISSION_DENIED


async def test_an_unknown_method_is_unimplemented(place: Place) -> None:
    opened = place.open(AUTHORITY.operator("ann"))
    assert await code_of(opened.unary_unary("/fleetune.v1.ControlService/Nonesuch")(b"")) == Status.UNIMPLEMENTED


async def test_a_handler_may_note_a_refusal_of_its_own(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    stub = control_pb2_grpc.ControlServiceStub(place.open(AUTHORITY.operator("ann")))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await stub.ListAudit(control_pb2.ListAuditRequest())
    assert [r.getMessage() for r in caplog.records if r.name == "fleetune.gate"] == [
        "refused caller='operator ann' method=/fleetune.v1.ControlService/ListAudit reason='it is a test'"
    ]


async def test_without_tls_everybody_is_local() -> None:
    server = grpc.aio.server(interceptors=[Gate(lambda _: "nobody stands", plaintext=True)])
    control_pb2_grpc.add_ControlServiceServicer_to_server(Control(), server)  # type: ignore[abstract]  # that is what is tested
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        answer = control_pb2_grpc.ControlServiceStub(opened).ServerInfo(control_pb2.ServerInfoRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await answer
    await server.stop(grace=0)


def test_outside_of_a_call_there_is_no_caller() -> None:
    with pytest.raises(LookupError):
        gate.caller()


# --- the table


def methods_of(*modules: Any) -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_the_table_holds_every_method_of_every_service_on_the_main_port_and_nothing_else() -> None:
    served = methods_of(fleet_pb2, blob_pb2, control_pb2, registry_pb2, health_pb2, reflection_pb2)
    assert set(permissions.RULES) == served - {"/fleetune.v1.JoinService/Join"}


AGENTS = {
    "/fleetune.v1.FleetService/Session",
    "/fleetune.v1.RegistryService/Renew",
    *methods_of(blob_pb2, health_pb2, reflection_pb2),
}
ADMINS = {
    "/fleetune.v1.ControlService/ListAudit",
    *(method for method in methods_of(registry_pb2) if not method.endswith(("Renew", "Join"))),
}
OPERATES = {f"/fleetune.v1.ControlService/{name}" for name in ("SubmitJob", "CancelJob", "PauseJob", "ResumeJob", "CollectGarbage")}
DEVICES_ONLY = {
    f"/fleetune.v1.{name}" for name in ("FleetService/Session", "BlobService/Upload", "BlobService/UploadStatus", "BlobService/Probe")
}


@pytest.mark.parametrize("method", sorted(permissions.RULES))
def test_each_identity_may_call_exactly_what_is_its(method: str) -> None:
    agent = Principal("agent", "oak", "device-oak")
    view, operate, admin = (Principal("operator", "ann", role=role) for role in (Role.VIEW, Role.OPERATE, Role.ADMIN))
    allowed = {p for p in (agent, view, operate, admin) if not permissions.objection(p, method)}
    expected = {admin, operate, view} - ({view} if method in OPERATES else set()) - ({view, operate} if method in ADMINS else set())
    expected -= {view, operate, admin} if method in DEVICES_ONLY else set()
    assert allowed == expected | ({agent} if method in AGENTS else set())
    assert permissions.objection(Principal("operator", "ann", role=Role.NONE), method)


def test_what_is_not_in_the_table_is_open_to_nobody_with_a_certificate() -> None:
    for principal in (Principal("agent", "oak", "device-oak"), Principal("operator", "ann", role=Role.ADMIN)):
        assert permissions.objection(principal, "/fleetune.v1.ControlService/SomethingNew")
    assert not permissions.objection(LOCAL, "/fleetune.v1.ControlService/ServerInfo")
