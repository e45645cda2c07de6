"""Who holds a state folder, and who of those may be told by a signal to read its files again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fleetune.coordinator import rotation, statelock
from fleetune.coordinator.faults import MachineError


def test_only_one_holds_a_folder_and_the_other_is_told_which(tmp_path: Path) -> None:
    with statelock.held(tmp_path):
        for _ in range(2):
            with pytest.raises(MachineError, match=rf"\(process {os.getpid()}\)"), statelock.held(tmp_path):
                pass
            statelock.say_reloads(tmp_path)
    with statelock.held(tmp_path):
        assert (tmp_path / statelock.FILE).read_text() == f"{os.getpid()}\n"


def test_only_a_living_owner_that_said_so_is_told_to_read_again(tmp_path: Path) -> None:
    assert statelock.reloading_owner(tmp_path) is None
    with statelock.held(tmp_path):
        # A program that does not know the signal, as an earlier version: it would end by it.
        assert statelock.reloading_owner(tmp_path) is None
        statelock.say_reloads(tmp_path)
        assert statelock.reloading_owner(tmp_path) == os.getpid()
    # It was killed, and its number may be anybody's.
    assert (tmp_path / statelock.FILE).read_text() == f"{os.getpid()} reloads\n"
    assert statelock.reloading_owner(tmp_path) is None


@pytest.mark.parametrize("text", ["", "reloads", "1 2 3", "x reloads", "-1 reloads", "² reloads"])
def test_a_lock_with_other_words_names_nobody(tmp_path: Path, text: str) -> None:
    with statelock.held(tmp_path):
        (tmp_path / statelock.FILE).write_text(text, encoding="utf-8")
        assert statelock.reloading_owner(tmp_path) is None


def test_an_owner_that_cannot_be_signalled_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def another_users(number: int, what: int) -> None:
        asked.append((number, what))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", another_users)
    with statelock.held(tmp_path):
        statelock.say_reloads(tmp_path)
        assert not rotation._tell(tmp_path)
    assert asked == [(os.getpid(), signal.SIGHUP)]
