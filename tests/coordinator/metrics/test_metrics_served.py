"""A real coordinator's metrics, read over HTTP as Prometheus does, and as nobody should."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from fleetune.complaints import ComplaintsError
from fleetune.coordinator import config
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.metrics import listener, service
from fleetune.coordinator.metrics.catalog import CATALOG
from fleetune.errors import ConfigError
from fleetune.v1 import control_pb2, control_pb2_grpc, fleet_pb2
from support import scraping
from support.coordinating import Coordinator, coordinating, echo_job
from support.echo_agent import EchoAgent
from support.secured import secured

LOOPBACK = "127.0.0.1:0"
GET_JOB = "/fleetune.v1.ControlService/GetJob"
LIST_JOBS = "/fleetune.v1.ControlService/ListJobs"
SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _every_reading_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FRESH_S", 0.0)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reader is cut for what a busy machine takes; what is about that says so itself."""
    monkeypatch.setattr(listener, "ASK_S", 60.0)


def port(coordinator: Coordinator) -> int:
    metrics = coordinator.running.metrics
    assert metrics is not None
    return metrics.port


# ------------------------------------------------------------------------------------------------------------ what is told


async def test_a_scrape_holds_every_metric_of_the_catalog(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        found = await scraping.scrape(port(coordinator))
        assert {row.name.removesuffix("_total") for row in CATALOG} <= found.families.keys()
        assert {"process_cpu_seconds", "process_open_fds", "process_resident_memory_bytes", "python_info"} <= found.families.keys()
        kinds = {row.name: row.kind for row in CATALOG}
        assert {name: found.families[name.removesuffix("_total")].type for name in kinds} == kinds


async def test_rounds_bytes_and_devices_are_counted(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        async with EchoAgent(coordinator.address, "oak") as oak, EchoAgent(coordinator.address, "elm") as elm:
            oak.serve()
            elm.serve()
            await coordinator.ended(await coordinator.submit(echo_job(rounds=3, minimum=2)))
            await oak.say(heartbeat=fleet_pb2.Heartbeat(sequence=1, cpu_percent=25.0, temperature_c=50.0))
            upload = {"method": "/fleetune.v1.BlobService/Upload", "code": "OK"}
            await until_told(coordinator, "fleetune_calls_total", least=6, **upload)
            found = await until_told(coordinator, "fleetune_device_cpu_ratio", device="oak")
        assert found.value("fleetune_devices_online") == 2
        assert found.value("fleetune_device_cpu_ratio", device="oak") == 0.25
        assert found.value("fleetune_jobs", status="completed") == 1
        assert found.value("fleetune_jobs_ended_total", status="completed") == 1
        assert found.value("fleetune_rounds_committed_total") == 3
        assert found.value("fleetune_round_duration_seconds_count") == 3
        assert found.value("fleetune_round_phase_duration_seconds_count", phase="training") == 3
        assert found.value("fleetune_round_phase_duration_seconds_count", phase="folding") == 3
        assert found.value("fleetune_updates_total", outcome="accepted") == 6
        assert found.value("fleetune_tasks_sent_total", kind="train") == 6
        assert found.value("fleetune_received_bytes_total") > 6 * 0.02 * 2**20
        assert found.value("fleetune_sent_bytes_total") > 6 * 0.02 * 2**20
        assert found.value("fleetune_transfers_active") == found.value("fleetune_transfers_waiting") == 0
        assert found.value("fleetune_blobs") > 0
        assert found.value("fleetune_database_bytes") > 0
        assert found.value("fleetune_disk_free_bytes") > 0
        assert found.value("fleetune_calls_total", **upload) == 6


async def until(true: Callable[[], object]) -> None:
    """Nothing tells when it becomes true: it is looked at, for as long as a bug would take."""
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never became true")


async def until_told(coordinator: Coordinator, name: str, *, least: float = 0.0, **labels: str) -> scraping.Scrape:
    """The first scrape that has this metric with no less: what makes it may be on its way, or be counted after the answer went out."""
    for _ in range(400):
        found = await scraping.scrape(port(coordinator))
        if found.has(name, **labels) and found.value(name, **labels) >= least:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name}{labels} was never told")


async def test_an_open_round_tells_its_tasks_and_when_it_moved(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator, EchoAgent(coordinator.address, "oak") as oak:
        job = await coordinator.submit(echo_job(rounds=1))
        await oak.next_task()
        found = await scraping.scrape(port(coordinator))
        assert found.value("fleetune_job_round_tasks", job_id=job.job_id, status="assigned") == 1
        assert found.value("fleetune_job_rounds_planned", job_id=job.job_id) == 1
        assert found.value("fleetune_devices_busy") == found.value("fleetune_device_busy", device="oak") == 1
        started = found.value("fleetune_job_round_started_timestamp_seconds", job_id=job.job_id)
        assert found.value("fleetune_job_moved_timestamp_seconds", job_id=job.job_id) >= started > 1e9


async def test_a_device_that_left_is_known_and_not_online(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        async with EchoAgent(coordinator.address, "oak"):
            there = await scraping.scrape(port(coordinator))
        await until(lambda: not coordinator.engine.registry.sessions)
        gone = await scraping.scrape(port(coordinator))
        assert [found.value("fleetune_device_online", device="oak") for found in (there, gone)] == [1, 0]
        before = there.value("fleetune_device_last_heard_timestamp_seconds", device="oak")
        assert gone.value("fleetune_device_last_heard_timestamp_seconds", device="oak") == pytest.approx(before, abs=20.0)
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        again = await scraping.scrape(port(coordinator))
        assert again.value("fleetune_device_last_heard_timestamp_seconds", device="oak") == pytest.approx(before, abs=20.0)


async def test_refused_calls_are_counted_by_method_and_status(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await coordinator.control.GetJob(control_pb2.GetJobRequest(job_id="none"))
        found = await until_told(coordinator, "fleetune_calls_total", least=3, method=GET_JOB, code="NOT_FOUND")
        assert found.value("fleetune_calls_total", method=GET_JOB, code="NOT_FOUND") == 3


async def test_a_device_that_asks_for_what_is_an_operator_s_is_counted_as_refused(tmp_path: Path) -> None:
    async with secured(tmp_path, metrics_listen=LOOPBACK) as fleet:
        who = await fleet.join(await fleet.token(), "oak")
        async with fleet.channel(who) as opened:
            with pytest.raises(grpc.aio.AioRpcError):
                await control_pb2_grpc.ControlServiceStub(opened).ListJobs(control_pb2.ListJobsRequest())
        found = await until_told(fleet.coordinator, "fleetune_calls_total", method=LIST_JOBS, code="PERMISSION_DENIED")
        assert found.value("fleetune_calls_total", method=LIST_JOBS, code="PERMISSION_DENIED") == 1
        assert found.value("fleetune_refusals_total") == 1


async def test_a_prediction_set_on_a_job_is_told_beside_what_the_round_took(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator, EchoAgent(coordinator.address, "oak") as oak:
        job = await coordinator.submit(echo_job(rounds=2))
        job.predicted_round = (1, 12.5)
        await oak.answer(await oak.next_task())
        await oak.next_task()  # of the second round: the first is committed
        found = await scraping.scrape(port(coordinator))
        assert found.value("fleetune_round_predicted_seconds", job_id=job.job_id) == 12.5
        assert found.value("fleetune_round_measured_seconds", job_id=job.job_id) > 0


async def test_nothing_is_served_where_nobody_asks_for_it(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as coordinator:
        assert coordinator.running.metrics is None


# ------------------------------------------------------------------------------------------------------------- how it is told


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"])
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
async def test_the_format_is_the_one_that_is_asked_for(tmp_path: Path, accept: str, encoding: str) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        answer = await scraping.ask(port(coordinator), Accept=accept, Accept_Encoding=encoding)
        assert answer.headers["content-type"].startswith("application/openmetrics-text" if accept else "text/plain; version=0.0.4")
        assert answer.headers.get("content-encoding", "identity") == encoding
        assert int(answer.headers["content-length"]) == len(answer.body)
        assert answer.text.endswith("# EOF\n" if accept else "\n")
        bare = await scraping.ask(port(coordinator), method="HEAD", Accept=accept, Accept_Encoding=encoding)
        assert (bare.status, bare.body) == (200, b"")


async def test_many_readers_at_once_cost_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FRESH_S", 60.0)
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        answers = await asyncio.gather(*(scraping.ask(port(coordinator)) for _ in range(10)))
        assert {answer.status for answer in answers} == {200}
        assert len({answer.body for answer in answers}) == 1


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 404), ("/metrics", "POST", 405), ("/metrics/x", "GET", 404), ("/metrics", "GET", 200), ("/metrics?a=b", "GET", 200)],
)
async def test_other_requests_get_their_status(tmp_path: Path, path: str, method: str, status: int) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        assert (await scraping.ask(port(coordinator), path, method=method)).status == status


@pytest.mark.parametrize(("host", "status"), [("localhost:9464", 200), ("[::1]", 200), ("127.0.0.1", 200), ("rebound.example", 421)])
async def test_a_web_page_cannot_read_them_under_a_name_that_leads_here(tmp_path: Path, host: str, status: int) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        assert (await scraping.ask(port(coordinator), Host=host)).status == status


async def test_a_bug_in_the_figures_is_an_error_of_the_server_and_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        with monkeypatch.context() as patched:
            patched.setattr("fleetune.coordinator.metrics.figures._store", None)
            assert (await scraping.ask(port(coordinator))).status == 500
        found = await until_told(coordinator, "fleetune_scrapes_total", status="500")
        assert found.value("fleetune_scrapes_total", status="500") == 1


# ------------------------------------------------------------------------------------------------------------- who may read


async def test_beyond_loopback_it_takes_tls_and_the_secret(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    async with secured(tmp_path, metrics_listen="0.0.0.0:0", metrics_bearer_file=secret) as fleet:
        tls = ssl.create_default_context(cadata=fleet.roots.decode())
        tls.check_hostname = False  # the certificate names the fleet, not an address
        at = port(fleet.coordinator)
        assert await scraping.raw(at, b"GET /metrics HTTP/1.1\r\n\r\n") == b"", "no plain HTTP"
        assert (await scraping.ask(at, tls=tls)).status == 401
        assert (await scraping.ask(at, tls=tls, Authorization=f"Bearer {SECRET[:-1]}")).status == 401
        found = await scraping.scrape(at, tls=tls, Authorization=f"Bearer {SECRET}")
        assert found.value("fleetune_certificate_expiry_timestamp_seconds", certificate="coordinator") > 1e9
        assert found.value("fleetune_certificate_expiry_timestamp_seconds", certificate="authority") > 1e9
        secret.write_text("f" * 40)
        assert (await scraping.ask(at, tls=tls, Authorization=f"Bearer {SECRET}")).status == 401, "a changed secret counts at once"
        assert (await scraping.ask(at, tls=tls, Authorization="Bearer " + "f" * 40)).status == 200
        secret.chmod(0o644)
        assert (await scraping.ask(at, tls=tls, Authorization="Bearer " + "f" * 40)).status == 401, "nor one that others can read"


async def test_strangers_are_told_nothing_whatever_made_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="other machines"):
        async with coordinating(tmp_path, metrics_listen="0.0.0.0:0"):
            pass


async def test_the_certificate_of_each_device_has_its_end(tmp_path: Path) -> None:
    async with secured(tmp_path, metrics_listen=LOOPBACK) as fleet:
        who = await fleet.join(await fleet.token(), "oak")
        found = await scraping.scrape(port(fleet.coordinator))
        end = found.value("fleetune_device_certificate_expiry_timestamp_seconds", device="oak")
        assert end == pytest.approx(who.facts.not_after_unix_s, abs=2.0)


@pytest.mark.parametrize(("text", "mode"), [("short", 0o600), (SECRET, 0o640), ("two words " + SECRET, 0o600), ("", 0o600)])
async def test_a_secret_that_protects_nothing_is_refused_at_the_start(tmp_path: Path, text: str, mode: int) -> None:
    secret = tmp_path / "secret"
    secret.write_text(text)
    secret.chmod(mode)
    with pytest.raises(ConfigError, match=r"bearer_file.*secret"):
        async with coordinating(tmp_path / "state", metrics_listen=LOOPBACK, metrics_bearer_file=secret):
            pass


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"metrics.listen": "0.0.0.0:9464"}, "bearer_file"),
        ({"metrics.listen": "0.0.0.0:9464", "plaintext": True, "metrics.bearer_file": "/x"}, "plaintext"),
        ({"metrics.listen": "9464"}, "HOST:PORT"),
    ],
)
def test_an_address_that_would_tell_strangers_is_a_complaint(changes: dict[str, object], remedy: str) -> None:
    with pytest.raises(ComplaintsError, match=remedy):
        config.load(None, {}, changes)


async def test_a_taken_port_is_told_with_the_option_that_changes_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(MachineError, match="--metrics-listen"):
            async with coordinating(tmp_path, metrics_listen=f"127.0.0.1:{taken.getsockname()[1]}"):
                pass


# ------------------------------------------------------------------------------------------------------------ hostile readers


GARBAGE = (
    b"\x00" * 4000 + b"\r\n\r\n",
    b"\x16\x03\x01" + bytes(range(256)) + b"\r\n\r\n",
    b"GET /metrics HTTP/9.9\r\n\r\n",
    b"GET " + b"/" * 4000 + b" HTTP/1.1\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 100_000,
    b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


async def test_garbage_disturbs_no_round(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator, EchoAgent(coordinator.address, "oak") as oak:
        oak.serve()
        job = await coordinator.submit(echo_job(rounds=5))
        for text in GARBAGE * 3:
            answer = await scraping.raw(port(coordinator), text)
            assert answer == b"" or scraping.parsed(answer).status in (200, 400, 404, 405), answer
        huge = b"GET /metrics HTTP/1.1\r\n" + b"".join(b"A%d: %s\r\n" % (n, b"b" * 1000) for n in range(500))
        answer = await scraping.raw(port(coordinator), huge)
        assert answer == b"" or scraping.parsed(answer).status == 431, "or the reset came before the answer was read"
        await coordinator.ended(job)
        assert job.machine.status == "completed"
        assert (await scraping.ask(port(coordinator))).status == 200


async def test_those_who_dawdle_make_room_for_who_asks(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        at = port(coordinator)
        dawdling = [await asyncio.open_connection("127.0.0.1", at) for _ in range(3 * listener.CONNECTIONS_MAX)]
        for _, writer in dawdling:
            writer.write(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        found = await until_told(coordinator, "fleetune_scrapes_total", least=2 * listener.CONNECTIONS_MAX, status="0")
        assert found.value("fleetune_scrapes_total", status="0") >= 2 * listener.CONNECTIONS_MAX
        for _, writer in dawdling:
            writer.transport.abort()


async def test_a_request_that_does_not_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "ASK_S", 0.2)
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        assert await scraping.raw(port(coordinator), b"GET /metrics HTTP/1.1\r\nX-Slow: ") == b""


async def test_an_answer_that_nobody_takes_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "ANSWER_S", 0.2)
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        metrics = coordinator.running.metrics
        assert metrics is not None
        monkeypatch.setattr(metrics._exposition, "render", lambda *_, **__: (b"x" * 64_000_000, "text/plain"))
        reader, writer = await asyncio.open_connection("127.0.0.1", metrics.port, limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        await until(lambda: metrics._listener.statuses.get(0) == 1)
        assert not metrics._listener._connections
        del reader
        writer.transport.abort()


async def test_handshakes_that_do_not_end_are_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "ASK_S", 0.2)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    async with secured(tmp_path, metrics_listen="0.0.0.0:0", metrics_bearer_file=secret) as fleet:
        assert await scraping.raw(port(fleet.coordinator), b"\x16\x03\x01\x02\x00") == b""
        assert await scraping.raw(port(fleet.coordinator), b"GET / HTTP/1.0\r\n\r\n") == b""


async def test_a_stop_waits_for_no_reader(tmp_path: Path) -> None:
    async with coordinating(tmp_path, metrics_listen=LOOPBACK) as coordinator:
        at = port(coordinator)
        reader, writer = await asyncio.open_connection("127.0.0.1", at)
        writer.write(b"GET /met")
        await scraping.ask(at)
    assert await reader.read() == b""
    writer.transport.abort()
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await asyncio.open_connection("127.0.0.1", at)
