"""Who has series of an own, what stands for the others, and what is told of a device that is gone."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from fleetune.coordinator.certificates import Roster
from fleetune.coordinator.domain import LinkFigures
from fleetune.coordinator.metrics import figures
from fleetune.coordinator.metrics.catalog import BY_NAME, OTHER
from fleetune.coordinator.metrics.exposition import Exposition
from fleetune.coordinator.metrics.figures import Figures, Reading
from fleetune.coordinator.metrics.shelf import Folder, ShelfFacts
from fleetune.coordinator.metrics.snapshot import JobFigures, Snapshot
from fleetune.coordinator.metrics.tally import Tally
from fleetune.coordinator.registry import Greeting, Session
from fleetune.coordinator.rpc.fleet import Line
from fleetune.coordinator.store.db import Database
from fleetune.coordinator.store.identities import CertificateRow
from fleetune.v1 import fleet_pb2

NOW = 1_000_000.0
SHELF = ShelfFacts(1, Folder(1, 2), Folder(), Folder(), 3, 4, {"coordinator": NOW})
READING = Reading({200: 1}, 0.0, 0.0)


@pytest.fixture
def roster() -> Roster:
    return Roster(Database(None), None, 30)


def line(name: str, heartbeat: fleet_pb2.Heartbeat | None) -> Line:
    session = Session(1, Greeting(f"id-{name}", name, "run-1"), True, "", 990.0)
    return Line(session, fleet_pb2.Hello(), telemetry=heartbeat)


def snapshot(roster: Roster, online: Mapping[str, fleet_pb2.Heartbeat | None], known: tuple[str, ...] = (), **changes: object) -> Snapshot:
    tally = Tally()
    facts: dict[str, object] = {
        "wall_s": NOW,
        "monotonic_s": 1000.0,
        "version": "1",
        "epoch": 1,
        "names": {name: f"id-{name}" for name in (*online, *known)},
        "lines": {f"id-{name}": line(name, heartbeat) for name, heartbeat in online.items()},
        "left_s": {},
        "seen_unix_s": {},
        "quarantined": frozenset(),
        "busy": frozenset(),
        "roster": roster,
        "statuses": {"running": 1},
        "jobs": (),
        "trouble": False,
        "counters": tally.counters,
        "histograms": tally.histograms,
        "paired": {},
        "calls": {("/fleetune.v1.FleetService/Session", "OK"): 3},
        "took_s": 0.0,
    }
    facts |= dict.fromkeys(("calls_open", "refusals", "received_bytes", "sent_bytes", "resumed", "receiving", "moving", "waiting"), 0)
    return Snapshot(**{**facts, **changes})  # type: ignore[arg-type]  # checked by the dataclass's own names


def told(taken: Snapshot) -> Figures:
    return figures.of(taken, SHELF, READING)


def beat(cpu: float, temperature: float | None = None) -> fleet_pb2.Heartbeat:
    return fleet_pb2.Heartbeat(cpu_percent=cpu, memory_available_bytes=100, temperature_c=temperature)


async def test_a_device_s_heartbeat_is_told_in_base_units(roster: Roster) -> None:
    values = told(snapshot(roster, {"oak": beat(50.0, 61.5)})).values
    assert values["fleetune_device_cpu_ratio"] == {("oak",): 0.5}
    assert values["fleetune_device_temperature_celsius"] == {("oak",): 61.5}
    assert values["fleetune_device_memory_available_bytes"] == {("oak",): 100.0}
    assert values["fleetune_device_last_heard_timestamp_seconds"] == {("oak",): NOW - 10.0}


async def test_a_device_without_a_sensor_has_no_temperature(roster: Roster) -> None:
    assert told(snapshot(roster, {"oak": beat(1.0)})).values["fleetune_device_temperature_celsius"] == {}


async def test_what_is_known_of_a_link_is_told_in_bytes(roster: Roster) -> None:
    taken = snapshot(roster, {"oak": beat(1.0), "elm": beat(1.0)})
    taken.lines["id-oak"].session.link = LinkFigures(up_bits_per_s=8000.0, down_bits_per_s=0.0, round_trip_s=0.02)
    values = told(taken).values
    assert values["fleetune_device_uplink_bytes_per_second"] == {("oak",): 1000.0}
    assert values["fleetune_device_downlink_bytes_per_second"] == {}
    assert values["fleetune_device_round_trip_seconds"] == {("oak",): 0.02}


async def test_of_a_device_that_is_gone_only_that_and_since_when_is_told(roster: Roster) -> None:
    values = told(snapshot(roster, {}, ("oak", "elm", "fir"), left_s={"id-oak": 900.0}, seen_unix_s={"id-elm": 5.0})).values
    assert values["fleetune_device_online"] == {("elm",): 0.0, ("fir",): 0.0, ("oak",): 0.0}
    assert values["fleetune_device_last_heard_timestamp_seconds"] == {("elm",): 5.0, ("oak",): NOW - 100.0}
    assert values["fleetune_device_cpu_ratio"] == {}


async def test_a_revoked_device_has_no_series(roster: Roster) -> None:
    roster._remember([CertificateRow("f", "agent", "oak", "id-oak", 0, "", "", "", 0.0, NOW, 0.0, 0.0, revoked_unix_s=1.0)])
    values = told(snapshot(roster, {}, ("oak", "elm"))).values
    assert values["fleetune_device_online"] == {("elm",): 0.0}
    assert (values["fleetune_devices_known"][()], values["fleetune_devices_revoked"][()]) == (1.0, 1.0)


async def test_beyond_the_cap_one_series_tells_the_number_or_the_worst(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DEVICES_SHOWN_MAX", 1)
    values = told(snapshot(roster, {"a": beat(10.0, 40.0), "b": beat(20.0, 80.0), "c": beat(90.0, 50.0)}, ("d",))).values
    assert values["fleetune_device_online"] == {("a",): 1.0, (OTHER,): 2.0}
    assert values["fleetune_device_cpu_ratio"] == {("a",): 0.1, (OTHER,): 0.9}
    assert values["fleetune_device_temperature_celsius"] == {("a",): 40.0, (OTHER,): 80.0}
    assert values["fleetune_devices_known"] == {(): 4.0}


async def test_a_name_that_is_none_gets_no_label_of_its_own(roster: Roster) -> None:
    values = told(snapshot(roster, {'x"} 1\nfleetune_epoch 9': beat(10.0)})).values
    assert set(values["fleetune_device_online"]) == {(OTHER,)}


async def test_only_so_many_jobs_have_series(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "JOBS_SHOWN_MAX", 1)
    jobs = tuple(JobFigures(job_id, 5, 2, 7.0, 8.0, {"assigned": 3}) for job_id in ("one", "two"))
    values = told(snapshot(roster, {}, jobs=jobs)).values
    assert values["fleetune_job_rounds_planned"] == {("one",): 5.0}
    assert values["fleetune_job_round_tasks"]["one", "assigned"] == 3.0
    assert values["fleetune_jobs"][("running",)] == 1.0


async def test_every_sample_is_of_the_catalog_and_has_its_labels(roster: Roster) -> None:
    jobs = (JobFigures("one", 5, 2, 7.0, 8.0, {}),)
    found = told(snapshot(roster, {"oak": beat(1.0, 2.0)}, jobs=jobs))
    for name, values in found.values.items():
        assert all(len(labels) == len(BY_NAME[name].labels) for labels in values), name
    for name, labels in found.histograms:
        assert len(labels) == len(BY_NAME[name].labels)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_the_text_is_read_by_the_library_s_own_parser(roster: Roster, accept: str) -> None:
    from prometheus_client import parser
    from prometheus_client.openmetrics import parser as openmetrics

    taken = snapshot(roster, {"oak": beat(1.0, 2.0)})
    text, content_type = Exposition().render(told(taken), accept, compress=False)
    read = openmetrics.text_string_to_metric_families if accept else parser.text_string_to_metric_families
    families = {family.name: family for family in read(text.decode())}
    assert {row.name.removesuffix("_total") for row in BY_NAME.values()} <= families.keys()
    assert "process_resident_memory_bytes" in families
    assert content_type.startswith("application/openmetrics-text; version=1.0.0" if accept else "text/plain; version=0.0.4")


async def test_figures_of_two_thousand_devices_take_less_than_this_process_has_time_for(roster: Roster) -> None:
    taken = snapshot(roster, {f"board-{number}": beat(1.0, 2.0) for number in range(2000)})
    began_s = time.process_time()
    text, _ = Exposition().render(told(taken), "", compress=True)
    assert len(text) < 500_000
    assert time.process_time() - began_s < 10.0
