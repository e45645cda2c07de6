"""Bit flips, cuts and losses on disk: each is noticed, and mended where whole bytes are still to be had."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fleetune.coordinator.domain import Blob, Prepared, RoundEntry
from fleetune.coordinator.rounds import adapter, damage, needs
from fleetune.coordinator.rounds.history import History
from fleetune.coordinator.rounds.machine import JobMachine
from fleetune.coordinator.rounds.needs import JobFacts
from fleetune.coordinator.store.blobs import BlobStore
from support.machines import PLAN
from support.spoil import KINDS, Kind, spoil

DATA = bytes(range(256)) * 64


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def put(store: BlobStore, data: bytes = DATA) -> Blob:
    return Blob(store.put_bytes(data), len(data))


def running(state: Blob, **prepared: object) -> JobFacts:
    machine = JobMachine(PLAN)
    machine.status, machine.state = "waiting", state
    if prepared:
        machine.prepared = Prepared(state, "t", **prepared)  # type: ignore[arg-type]  # its own fields
    return JobFacts("job", machine, History(), 3)


def committed(store: BlobStore, jobs: Path, *, own_bytes: bool) -> tuple[JobFacts, Blob]:
    """A running job whose first round is committed; its folder shares the blob's bytes or has its own."""
    state = put(store)
    job = running(state)
    job.machine.committed = 1
    job = JobFacts("job", job.machine, History.of([RoundEntry(1, "committed", 0.0, state=state)]), 3)
    folder = adapter.folder(jobs, "job", 1)
    folder.mkdir(parents=True)
    if own_bytes:
        (folder / adapter.STATE_FILE).write_bytes(DATA)
    else:
        store.link_out(state.digest, folder / adapter.STATE_FILE)
    return job, state


def test_200_of_200_random_damages_are_noticed(store: BlobStore) -> None:
    rng = random.Random(7)
    for number in range(200):
        blob = put(store, rng.randbytes(rng.randrange(1, 5000)))
        assert damage.is_whole(store, blob)
        spoil(store.path(blob.digest), KINDS[number % len(KINDS)], rng)
        assert damage.withdrawn(store, blob), number
        assert not store.has(blob.digest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_from_its_adapter_folder(store: BlobStore, tmp_path: Path, kind: Kind) -> None:
    job, state = committed(store, tmp_path / "jobs", own_bytes=True)
    spoil(store.path(state.digest), kind)
    assert damage.ailment(store, tmp_path / "jobs", damage.standing(job)) == ""
    assert damage.is_whole(store, state)


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_a_state_whose_folder_shares_the_damage_is_named(store: BlobStore, tmp_path: Path, kind: Kind) -> None:
    job, state = committed(store, tmp_path / "jobs", own_bytes=False)
    spoil(store.path(state.digest), kind)
    told = damage.ailment(store, tmp_path / "jobs", damage.standing(job))
    assert state.digest[:12] in told
    assert "restore a backup" in told
    assert not store.has(state.digest), "nobody fetches it"


def test_an_older_whole_round_is_named_as_the_way_out(store: BlobStore, tmp_path: Path) -> None:
    job, first = committed(store, tmp_path / "jobs", own_bytes=False)
    second = put(store, b"the second state")
    job.machine.state, job.machine.committed = second, 2
    job = JobFacts("job", job.machine, History.of([*job.history, RoundEntry(2, "committed", 0.0, state=second)]), 3)
    spoil(store.path(second.digest), "flip")
    told = damage.ailment(store, tmp_path / "jobs", damage.standing(job))
    assert "fleetune export job DIR --round 1" in told
    assert damage.is_whole(store, first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_file_is_copied_again_from_the_model_folder(store: BlobStore, tmp_path: Path, kind: Kind) -> None:
    base = tmp_path / "model"
    base.mkdir()
    (base / "config.json").write_bytes(DATA)
    blob = put(store)
    job = running(put(store, b"state"), base_folder=str(base), files=(("config.json", blob.digest, blob.size_bytes),))
    spoil(store.path(blob.digest), kind)
    assert damage.ailment(store, tmp_path / "jobs", damage.standing(job), base_in_full=True) == ""
    assert damage.is_whole(store, blob)
    assert os.stat(store.path(blob.digest)).st_nlink == 1, "the folder is somebody else's: no shared bytes"


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_file_that_the_folder_holds_no_more_is_named(store: BlobStore, tmp_path: Path, kind: Kind) -> None:
    base = tmp_path / "model"
    base.mkdir()
    (base / "config.json").write_bytes(b"of another model")
    blob = put(store)
    job = running(put(store, b"state"), base_folder=str(base), files=(("config.json", blob.digest, blob.size_bytes),))
    spoil(store.path(blob.digest), kind)
    told = damage.ailment(store, tmp_path / "jobs", damage.standing(job), base_in_full=True)
    assert "config.json" in told
    assert "submit the job again" in told


def test_at_start_the_size_of_a_base_file_tells_without_reading_it(store: BlobStore, tmp_path: Path) -> None:
    blob = put(store)
    job = running(put(store, b"state"), base_folder=str(tmp_path), files=(("gone.bin", blob.digest, blob.size_bytes),))
    spoil(store.path(blob.digest), "cut")
    assert "gone.bin" in damage.ailment(store, tmp_path / "jobs", damage.standing(job))


def test_an_ended_job_loses_nothing_but_the_log_line(store: BlobStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, state = committed(store, tmp_path / "jobs", own_bytes=False)
    job.machine.status = "completed"
    store.path(state.digest).unlink()
    assert damage.ailment(store, tmp_path / "jobs", damage.standing(job)) == ""
    assert damage.is_whole(store, state), "its folder had it"
    spoil(store.path(state.digest), "cut")
    assert damage.ailment(store, tmp_path / "jobs", damage.standing(job)) == ""
    assert "kept state of round 1" in caplog.text


def test_a_new_state_in_evaluation_is_no_ailment_since_it_can_be_made_again(store: BlobStore, tmp_path: Path) -> None:
    start, fresh, optimizer = put(store, b"start"), put(store, b"fresh"), put(store, b"optimizer")
    job = running(start)
    job.machine.round = RoundEntry(1, "evaluating", 0.0, start_state=start, state=fresh, optimizer=optimizer)
    assert set(needs.fresh_states(job)) == {fresh.digest, optimizer.digest}
    spoil(store.path(fresh.digest), "flip")
    assert damage.ailment(store, tmp_path / "jobs", damage.standing(job)) == ""
    assert damage.withdrawn_any(store, needs.fresh_states(job).values())
    assert store.has(optimizer.digest) and not store.has(fresh.digest)
    assert fresh.digest in needs.needed_by(job), "what is made again is not cleared away"


def test_a_new_state_that_is_the_one_the_round_began_with_cannot_be_made_again(store: BlobStore) -> None:
    start = put(store, b"start")
    job = running(start)
    job.machine.round = RoundEntry(1, "evaluating", 0.0, start_state=start, state=start)
    assert needs.fresh_states(job) == {}
    job.machine.round = RoundEntry(1, "folding", 0.0, start_state=start)
    assert needs.fresh_states(job) == {}
