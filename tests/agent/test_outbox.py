"""The outbox: what it holds survives, what is damaged is found, what is nobody's goes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from fleetune.agent.domain import Blob, Evaluated, Failed, FailureKind, Refused, Update
from fleetune.agent.outbox import DATABASE_NAME, Outbox
from fleetune.errors import ConfigError

DATA = b"tensors" * 1000


@pytest.fixture(params=["memory", "file"])
def outbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Outbox]:
    made = Outbox(tmp_path, ":memory:" if request.param == "memory" else None)
    yield made
    made.close()


def written(outbox: Outbox, task_id: str = "job/1/device/train", lease: int = 1, data: bytes = DATA) -> Update:
    path = outbox.path_for(task_id, lease, 1)
    path.write_bytes(data)
    return Update(task_id, lease, 1, Blob(blake3(data).hexdigest(), len(data)), path.name, b"report")


def test_every_kind_of_result_comes_back_as_it_was_put_in_order(outbox: Outbox) -> None:
    results = (
        written(outbox),
        Evaluated("t2", 2, 1, b"\x00evaluation"),
        Failed("t3", 3, 1, FailureKind.OUT_OF_MEMORY, "train", "zu wenig Speicher …", "Traceback"),
        Refused("t4", 4, 1, "on battery"),
    )
    for result in results:
        outbox.put(result)
    assert outbox.results() == results
    assert outbox.recover().results == results


def test_an_update_is_held_to_its_rate_after_a_restart(outbox: Outbox) -> None:
    paced = replace(written(outbox), uplink_bits_per_s=2e6)
    outbox.put(paced)
    assert outbox.recover().results == (paced,)
    outbox.put(replace(paced, lease=2, uplink_bits_per_s=0.0))
    assert outbox.results() == (replace(paced, lease=2, uplink_bits_per_s=0.0),)
    outbox.put(replace(paced, lease=3))
    outbox.delete(replace(paced, lease=3))
    # A result of the same name that nobody has planned goes as fast as it can.
    outbox.put(replace(paced, lease=4, uplink_bits_per_s=0.0))
    assert outbox.results() == (replace(paced, lease=4, uplink_bits_per_s=0.0),)


def test_a_second_result_of_a_task_takes_the_place_of_the_first(outbox: Outbox) -> None:
    outbox.put(Refused("t1", 1, 1, "on battery"))
    outbox.put(Evaluated("t1", 2, 1, b"x"))
    assert outbox.results() == (Evaluated("t1", 2, 1, b"x"),)


def test_deleting_removes_row_and_file_and_may_be_repeated(outbox: Outbox) -> None:
    update = written(outbox)
    outbox.put(update)
    outbox.delete(update)
    outbox.delete(update)
    assert outbox.results() == ()
    assert not outbox.path_of(update).exists()


def test_deleting_an_older_result_leaves_the_newer_one(outbox: Outbox) -> None:
    outbox.put(Evaluated("t1", 2, 1, b"new"))
    outbox.delete(Refused("t1", 1, 1, "on battery"))
    assert outbox.results() == (Evaluated("t1", 2, 1, b"new"),)


def test_a_result_that_was_sent_under_a_newer_lease_is_deleted_too(outbox: Outbox) -> None:
    update = written(outbox)
    outbox.put(update)
    outbox.delete(replace(update, lease=5))
    assert outbox.results() == ()


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA[:-1] + b"?"])
def test_a_torn_or_changed_update_file_is_found_at_recovery(outbox: Outbox, damage: bytes) -> None:
    update = written(outbox)
    outbox.put(update)
    outbox.path_of(update).write_bytes(damage)
    assert outbox.recover().damaged == (update,)


def test_a_missing_update_file_is_found_at_recovery(outbox: Outbox) -> None:
    update = written(outbox)
    outbox.put(update)
    outbox.path_of(update).unlink()
    assert outbox.recover().damaged == (update,)


def test_files_without_a_row_are_removed_at_recovery_also_half_written_ones(outbox: Outbox) -> None:
    kept = written(outbox)
    outbox.put(kept)
    orphan = outbox.path_of(written(outbox, "other"))
    half = orphan.with_name(f".{orphan.name}.part")
    half.write_bytes(b"half")
    outbox.recover()
    assert outbox.path_of(kept).exists()
    assert not orphan.exists()
    assert not half.exists()


def test_another_lease_of_a_task_has_another_file(outbox: Outbox) -> None:
    assert len({outbox.path_for("t1", 1, 1), outbox.path_for("t1", 2, 1), outbox.path_for("t1", 1, 2)}) == 3


def test_what_was_put_is_there_after_the_process_was_killed(tmp_path: Path) -> None:
    killed = Outbox(tmp_path)
    update = written(killed)
    killed.put(update)
    # No close: the write-ahead log is what kill -9 leaves.
    reader = Outbox(tmp_path)
    assert reader.results() == (update,)
    reader.close()
    killed.close()


def test_a_database_that_is_none_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(b"not a database, but long enough to be read as one" * 100)
    outbox = Outbox(tmp_path)
    assert outbox.results() == ()
    assert (tmp_path / f"{DATABASE_NAME}.damaged").exists()
    outbox.close()


def test_an_outbox_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / DATABASE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="layout 99"):
        Outbox(tmp_path)
