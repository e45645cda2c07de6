"""`fleetune init`: everything or what was missing, and nothing overwritten."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from fleetune.coordinator import initialise, statelock, tlsfolder
from fleetune.coordinator.cli import main
from fleetune.coordinator.config import TlsFiles
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.coordinator.faults import FolderInUseError, MachineError
from fleetune.errors import ConfigError
from fleetune.wire import identity
from support.coordinating import settings


def init(folder: Path, name: str = "ada", address: str = "192.0.2.7:7433", **changes: object) -> initialise.Initialised:
    return initialise.initialise(settings(folder / "state", plaintext=False, **changes), name, folder / name, address)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_it_makes_an_authority_and_an_administrator(tmp_path: Path) -> None:
    done = init(tmp_path)
    ada = identity.load(tmp_path / "ada")
    assert ada is not None
    assert (ada.facts.kind, ada.facts.name, ada.facts.role, ada.facts.coordinator) == ("operator", "ada", "admin", "192.0.2.7:7433")
    assert ada.roots == (tmp_path / "state" / "tls" / "roots.pem").read_bytes()
    assert done.new_authority
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "ada").iterdir()} == {0o600}
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "coordinator.sqlite")) as raw:
        assert raw.execute("SELECT kind, name, role FROM certificates").fetchall() == [("operator", "ada", 3)]
        assert raw.execute("SELECT actor, subject FROM audit").fetchall() == [("fleetune init", "operator ada")]


def test_a_second_time_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    init(tmp_path)
    before = files(tmp_path / "state" / "tls"), files(tmp_path / "ada")
    with pytest.raises(FolderInUseError, match="authority"):
        init(tmp_path)
    assert (files(tmp_path / "state" / "tls"), files(tmp_path / "ada")) == before


def test_who_has_lost_their_identity_gets_another_from_the_same_authority(tmp_path: Path) -> None:
    first = init(tmp_path)
    before = files(tmp_path / "state" / "tls")
    second = init(tmp_path, "grace")
    assert not second.new_authority
    assert second.root_fingerprint == first.root_fingerprint
    assert {name: data for name, data in files(tmp_path / "state" / "tls").items() if name in before} == before


def test_an_identity_of_another_coordinator_is_not_overwritten(tmp_path: Path) -> None:
    init(tmp_path)
    before = files(tmp_path / "ada")
    with pytest.raises(ConfigError, match="holds an identity"):
        initialise.initialise(settings(tmp_path / "other", plaintext=False), "ada", tmp_path / "ada", "")
    assert files(tmp_path / "ada") == before
    assert not (tmp_path / "other" / "tls").exists()


def test_a_folder_that_lacks_a_file_is_named_and_left_alone(tmp_path: Path) -> None:
    init(tmp_path)
    (tmp_path / "state" / "tls" / tlsfolder.AUTHORITY_KEY).unlink()
    with pytest.raises(ConfigError, match=r"lacks authority\.key"):
        init(tmp_path, "grace")


def test_it_waits_for_the_coordinator_to_stop(tmp_path: Path) -> None:
    init(tmp_path)
    with statelock.held(tmp_path / "state"), pytest.raises(MachineError, match="in use"):
        init(tmp_path, "grace")


def test_a_killed_init_is_completed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fleetune.coordinator.operator.put", killed)
    with pytest.raises(KeyboardInterrupt):
        init(tmp_path)
    monkeypatch.undo()
    before = files(tmp_path / "state" / "tls")
    assert not init(tmp_path).new_authority
    assert files(tmp_path / "state" / "tls") == before
    assert identity.load(tmp_path / "ada") is not None


@pytest.mark.parametrize("name", ["", "ada lovelace", "x" * 64, "../ada"])
def test_a_name_that_no_certificate_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        initialise.initialise(settings(tmp_path / "state", plaintext=False), name, tmp_path / "ada", "")


def test_with_another_authority_there_is_none_to_make(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.\*"):
        init(tmp_path, tls=TlsFiles(tmp_path, tmp_path, tmp_path))


def test_serving_without_certificates_names_what_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--state-dir", str(tmp_path / "s"), "--listen", "127.0.0.1:0"]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "fleetune init" in said
    assert "--plaintext" in said
