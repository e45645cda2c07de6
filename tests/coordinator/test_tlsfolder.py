"""The authority's files: whole at any instant, private, and rotated without a gap."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fleetune.coordinator import authority, tlsfolder
from fleetune.coordinator.faults import FolderInUseError
from fleetune.errors import ConfigError

DAY_S = 86_400.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tlsfolder.make(tmp_path, "192.0.2.7:7433", time.time())
    return tmp_path / "tls"


def test_everything_is_there_and_private(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*tlsfolder.REQUIRED, tlsfolder.ADDRESS}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    found = tlsfolder.read(folder)
    assert found.address == "192.0.2.7:7433"
    assert found.server_root == found.authority.fingerprint


def test_a_second_authority_is_refused_and_the_first_stays(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FolderInUseError):
        tlsfolder.make(folder.parent, "", time.time())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["tls"]


def test_what_a_killed_init_has_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".tls.abc").mkdir()
    (tmp_path / ".tls.abc" / "authority.key").write_text("half")
    tlsfolder.make(tmp_path, "", time.time())
    assert [path.name for path in tmp_path.iterdir()] == ["tls"]


@pytest.mark.parametrize("name", [tlsfolder.AUTHORITY_KEY, tlsfolder.SERVER_KEY])
def test_a_key_that_others_can_read_is_refused(folder: Path, name: str) -> None:
    (folder / name).chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        tlsfolder.read(folder)


@pytest.mark.parametrize("name", tlsfolder.REQUIRED)
def test_a_damaged_file_is_named_or_refused_and_never_a_crash(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"nothing of use")
    with pytest.raises(ConfigError):
        tlsfolder.read(folder)


def test_a_rotation_signs_with_the_new_root_and_keeps_the_old_one_trusted(folder: Path) -> None:
    old = tlsfolder.read(folder)
    new = tlsfolder.rotate(folder, time.time())
    assert new.authority.fingerprint != old.authority.fingerprint
    assert [authority.fingerprint(root) for root in authority.certificates(new.roots)] == [
        new.authority.fingerprint,
        old.authority.fingerprint,
    ]
    assert new.server_chain == old.server_chain
    with pytest.raises(FolderInUseError, match="already"):
        tlsfolder.rotate(folder, time.time())
    done = tlsfolder.finish(folder, time.time())
    assert done.server_root == new.authority.fingerprint
    assert len(authority.certificates(done.roots)) == 1
    assert not (folder / tlsfolder.PREVIOUS_KEY).exists()
    with pytest.raises(ConfigError, match="not being rotated"):
        tlsfolder.finish(folder, time.time())


@pytest.mark.parametrize("step", [tlsfolder.rotate, tlsfolder.finish])
def test_a_rotation_that_is_cut_short_anywhere_leaves_what_can_be_used_and_done_again(
    tmp_path: Path, step: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tlsfolder._write  # pyright: ignore[reportPrivateUsage]  # where it is cut
    for cut_at in range(4):
        state = tmp_path / f"{cut_at}"
        state.mkdir()
        tlsfolder.make(state, "", time.time())
        folder = state / "tls"
        if step is tlsfolder.finish:
            tlsfolder.rotate(folder, time.time())
        left = cut_at

        def killed(path: Path, data: bytes) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            write(path, data)

        monkeypatch.setattr(tlsfolder, "_write", killed)
        if cut_at < 3:
            with pytest.raises(KeyboardInterrupt):
                step(folder, time.time())  # type: ignore[operator]  # one of two functions
        else:
            step(folder, time.time())  # type: ignore[operator]
        monkeypatch.undo()
        # What a start does.
        tlsfolder.mend(folder, time.time())
        found = tlsfolder.read(folder)
        assert found.server_root in {authority.fingerprint(root) for root in authority.certificates(found.roots)}
        if found.previous is None and step is tlsfolder.rotate:
            found = tlsfolder.rotate(folder, time.time())
        if found.previous is not None:
            found = tlsfolder.finish(folder, time.time())
        assert found.server_root == found.authority.fingerprint


def test_the_server_s_certificate_is_renewed_in_the_last_third_of_its_life(folder: Path) -> None:
    before = tlsfolder.read(folder)
    assert not tlsfolder.mend(folder, time.time() + 200 * DAY_S)
    assert tlsfolder.mend(folder, time.time() + 300 * DAY_S)
    after = tlsfolder.read(folder)
    assert after.server_chain != before.server_chain
    assert after.server_key == before.server_key


def test_during_a_rotation_the_server_s_certificate_is_renewed_from_the_old_root(folder: Path) -> None:
    old = tlsfolder.read(folder)
    tlsfolder.rotate(folder, time.time())
    assert tlsfolder.mend(folder, time.time() + 300 * DAY_S)
    assert tlsfolder.read(folder).server_root == old.authority.fingerprint
