"""The operator's client against a real gRPC server with a small fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fleetune.complaints import ComplaintsError
from fleetune.coordinator import client as client_module
from fleetune.coordinator.client import Client
from fleetune.coordinator.faults import FolderInUseError, NotFoundError, RefusedError
from fleetune.errors import UnreachableError, WireError
from fleetune.v1 import blob_pb2
from fleetune.v1 import control_pb2 as pb
from support import control_service, job_views
from support.control_service import Fleet


@pytest.fixture
def fleet() -> Fleet:
    view = job_views.in_training()
    return Fleet(jobs={view.job_id: view}, adapter=control_service.adapter_files())


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[Client]:
    async with control_service.serving(fleet) as address, Client(address) as opened:
        yield opened
    # A closed channel keeps its sockets until it is collected, and pytest keeps a fixture's value until after the leak check.
    vars(opened).clear()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_dead_address_is_unreachable_and_says_what_to_do() -> None:
    async with Client(control_service.dead_address()) as client:
        with pytest.raises(UnreachableError, match="fleetune serve") as caught:
            await client.jobs()
    assert client.address in caught.value.message


async def test_an_address_without_a_port_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Client("localhost")


async def test_an_unknown_job_is_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError, match="nonesuch"):
        await client.job("nonesuch")


async def test_a_job_is_found_by_a_prefix_and_as_the_last(client: Client) -> None:
    assert (await client.job("7f")).job_id == "7f3a21c9"
    assert (await client.job("last")).job_id == "7f3a21c9"


async def test_every_complaint_about_a_job_file_arrives(client: Client, fleet: Fleet) -> None:
    fleet.complaints = [
        pb.Complaint(path="lora.rank", value="0", allowed="a whole number from 1 to 1024", remedy="Set lora.rank."),
        pb.Complaint(path="data.name", allowed="a name", remedy="Name the data."),
    ]
    with pytest.raises(ComplaintsError) as caught:
        await client.submit("name = 'x'")
    assert [item.path for item in caught.value.complaints] == ["lora.rank", "data.name"]


async def test_two_submits_carry_two_ids_so_that_both_make_a_job(client: Client, fleet: Fleet) -> None:
    await client.submit("a")
    await client.submit("a")
    first, second = (request.submit_id for request in fleet.submitted)
    assert first != second


async def test_an_ended_job_cannot_be_cancelled(client: Client, fleet: Fleet) -> None:
    fleet.jobs["7f3a21c9"].state = pb.JOB_STATE_COMPLETED
    with pytest.raises(RefusedError, match="has ended"):
        await client.cancel("last", "")


async def test_a_watch_ends_with_the_job_and_always_carries_its_history(client: Client, fleet: Fleet) -> None:
    history = [job_views.committed(number) for number in range(1, 11)]
    fleet.watched = [
        job_views.job(history=history[:5]),
        job_views.job(history=history[:6]),
        job_views.job(pb.JOB_STATE_COMPLETED, history=history, ended_after_s=120),
    ]
    seen = [view async for view in client.watch("last")]
    assert seen[-1].state == pb.JOB_STATE_COMPLETED
    assert all(len(view.history) >= view.rounds_committed for view in seen)
    assert [item.round for item in seen[-1].history] == list(range(1, 11))


async def test_a_watch_of_an_ended_job_is_one_view(client: Client, fleet: Fleet) -> None:
    fleet.jobs["7f3a21c9"] = job_views.job(pb.JOB_STATE_FAILED, ended_after_s=3)
    assert [view.state async for view in client.watch("last")] == [pb.JOB_STATE_FAILED]


async def test_a_watch_that_is_left_is_cancelled_on_the_coordinator(client: Client, fleet: Fleet) -> None:
    fleet.watched = [job_views.in_training()]
    views = client.watch("last")
    assert (await anext(views)).job_id
    assert (await anext(views)).job_id
    assert fleet.watches_open == 1
    await views.aclose()  # type: ignore[attr-defined]  # an async generator behind its interface
    await asyncio.wait_for(fleet.watch_ended.wait(), 60)
    assert fleet.watches_open == 0


async def test_a_watch_goes_on_when_the_coordinator_comes_back(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_S", 0.01)
    said: list[str] = []
    fleet.watched = [job_views.in_training()]
    states: list[int] = []
    async with control_service.serving(fleet) as address:
        client = Client(address)
        views = client.watch("last", said.append)
        states += [(await anext(views)).state, (await anext(views)).state]
    after = Fleet(jobs={"7f3a21c9": job_views.job(pb.JOB_STATE_COMPLETED, ended_after_s=9)})
    waiting = asyncio.ensure_future(anext(views))
    async with control_service.serving(after, address):
        states.append((await waiting).state)
        assert [view async for view in views] == []
        await client.__aexit__(None, None, None)
    assert states == [pb.JOB_STATE_RUNNING, pb.JOB_STATE_RUNNING, pb.JOB_STATE_COMPLETED]
    assert "trying again" in said[0]
    assert said[-1] == ""


async def test_a_watch_gives_up_when_the_coordinator_stays_away(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_S", 0.01)
    monkeypatch.setattr(client_module, "RECONNECT_S", 0.05)
    fleet.watched = [job_views.in_training()]
    async with control_service.serving(fleet) as address:
        client = Client(address)
        views = client.watch("last")
        await anext(views)
    async with client:
        with pytest.raises(UnreachableError):
            [view async for view in views]


async def test_an_export_is_the_whole_folder(client: Client, fleet: Fleet, tmp_path: Path) -> None:
    done = await client.export("last", tmp_path / "deep" / "adapter")
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == fleet.adapter
    assert done.files == 3
    assert done.size_bytes == sum(map(len, fleet.adapter.values()))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["adapter"]


async def test_an_export_asks_for_the_round_it_was_told(client: Client, fleet: Fleet, tmp_path: Path) -> None:
    await client.export("last", tmp_path / "third", round_number=3)
    await client.export("last", tmp_path / "best", best=True)
    assert [(request.round, request.best) for request in fleet.described] == [(3, False), (0, True)]


async def test_an_export_goes_on_after_a_cut_where_it_was(
    client: Client, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_S", 0.0)
    fleet.break_downloads_at = [2000, 4000]
    counted: list[int] = []
    done = await client.export("last", tmp_path / "adapter", on_bytes=counted.append)
    assert (done.folder / "adapter_model.safetensors").read_bytes() == fleet.adapter["adapter_model.safetensors"]
    assert sum(counted) == len(fleet.adapter["adapter_model.safetensors"])


def _flip(chunk: blob_pb2.Chunk) -> None:
    chunk.data = b"\xff" + chunk.data[1:]


def _shift(chunk: blob_pb2.Chunk) -> None:
    chunk.offset += 1


@pytest.mark.parametrize("damage", [_flip, _shift])
async def test_a_damaged_download_leaves_nothing_behind(client: Client, fleet: Fleet, tmp_path: Path, damage: object) -> None:
    fleet.damage = damage  # type: ignore[assignment]  # one of the two above
    with pytest.raises(WireError):
        await client.export("last", tmp_path / "adapter")
    assert names_in(tmp_path) == []


async def test_a_folder_with_something_in_it_is_not_written_into(client: Client, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUseError, match="--force"):
        await client.export("last", tmp_path)
    assert names_in(tmp_path) == ["notes.txt"]


async def test_force_replaces_files_of_the_same_names_and_no_others(client: Client, fleet: Fleet, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("old")
    await client.export("last", folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.md").read_bytes() == fleet.adapter["README.md"]


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", "", "a\0b", "a\\b"])
async def test_a_file_name_that_leaves_the_folder_is_refused(client: Client, fleet: Fleet, tmp_path: Path, name: str) -> None:
    fleet.adapter[name] = b"x"
    with pytest.raises(WireError, match="bare names"):
        await client.export("last", tmp_path / "adapter")
    assert names_in(tmp_path) == []


async def test_health_and_server_info_are_answered(client: Client) -> None:
    assert await client.serving()
    assert (await client.server_info()).version == "0.0.test"
