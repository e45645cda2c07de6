"""The device's id and the lock on its state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.agent import identity
from fleetune.errors import ConfigError


def test_an_id_is_made_once_and_kept(tmp_path: Path) -> None:
    state_dir = tmp_path / "deep" / "state"
    made = identity.device_id(state_dir)
    assert len(made) == 32
    assert set(made) <= set("0123456789abcdef")
    assert identity.device_id(state_dir) == made
    assert identity.device_id(tmp_path / "other") != made


def test_the_id_file_is_the_owner_s_alone_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    identity.device_id(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [identity.ID_FILE]
    assert (tmp_path / identity.ID_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"abc", b"\x00" * 32, b"g" * 32, b"\xff\xfe", b"A" * 32, b"a" * 33, b"0" * 5000])
def test_a_damaged_id_file_is_told_and_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / identity.ID_FILE
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="32 hex digits") as caught:
        identity.device_id(tmp_path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_state_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="state_dir"), identity.lock(tmp_path / "state"):
        pass


def test_a_second_agent_is_told_which_process_has_the_folder(tmp_path: Path) -> None:
    with identity.lock(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), identity.lock(tmp_path):
            pass
    with identity.lock(tmp_path):
        pass


def test_a_killed_agent_leaves_no_lock_behind(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from fleetune.agent import identity\n"
        "with identity.lock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {agent.pid}"), identity.lock(tmp_path):
            pass
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    with identity.lock(tmp_path):
        pass


@pytest.mark.parametrize("name", ["pi-5", "a", "A.b_c-9", "x" * 63])
def test_a_plain_word_is_a_device_name(name: str) -> None:
    assert identity.require_name(name) == name


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "x" * 64, "a\n", "../a"])
def test_anything_else_is_not(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 63"):
        identity.require_name(name)
