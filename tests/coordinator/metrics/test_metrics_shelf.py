"""What the disk is asked for the metrics, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509

from fleetune.coordinator.metrics import shelf
from fleetune.coordinator.metrics.pace import Paced, paced
from fleetune.coordinator.metrics.shelf import Certificates, Folder, Shelf
from support.certificates import Authority


def fill(folder: Path, *sizes: int) -> None:
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / str(number)).write_bytes(b"x" * size)


def test_sizes_of_the_store_are_told(tmp_path: Path) -> None:
    fill(tmp_path / "blobs", 10, 20)
    fill(tmp_path / "spool", 5)
    (tmp_path / "coordinator.sqlite").write_bytes(b"x" * 7)
    (tmp_path / "coordinator.sqlite-wal").write_bytes(b"x" * 3)
    found = Shelf(tmp_path, None).look()
    assert (found.blobs, found.spool, found.damaged) == (Folder(2, 30), Folder(1, 5), Folder())
    assert found.database_bytes == 10
    assert found.size_bytes >= found.free_bytes > 0
    assert found.expiries_unix_s == {}


def test_folders_of_thousands_are_not_read_at_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "blobs", 10)
    looking = Shelf(tmp_path, None)
    assert looking.look().blobs.files == 1
    (tmp_path / "blobs" / "more").write_bytes(b"x")
    assert looking.look().blobs.files == 1
    monkeypatch.setattr(shelf, "LOOK_S", 0.0)
    assert looking.look().blobs.files == 2


def test_ends_of_certificates_are_told_as_long_as_the_files_can_be_read(tmp_path: Path) -> None:
    authority = Authority()
    certificate, roots = tmp_path / "server.pem", tmp_path / "roots.pem"
    certificate.write_bytes(authority.root)
    looking = Shelf(tmp_path, Certificates(certificate, roots))
    end = x509.load_pem_x509_certificate(authority.root).not_valid_after_utc.timestamp()
    assert looking.look().expiries_unix_s == {"coordinator": end}
    roots.write_bytes(authority.root)
    assert looking.look().expiries_unix_s == {"coordinator": end, "authority": end}
    certificate.write_bytes(b"half of a cert")
    assert looking.look().expiries_unix_s == {"authority": end}


def test_a_breath_changes_nothing_of_what_is_read() -> None:
    assert list(paced(range(1000))) == list(Paced(range(1000))) == list(range(1000))
