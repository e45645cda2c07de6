"""The coordinator's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.complaints import ComplaintsError
from fleetune.coordinator import config

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy/config/coordinator.toml"


def test_the_commented_example_holds_the_defaults() -> None:
    example = config.load(EXAMPLE, {}, home=Path("/srv/ada"))
    plain = config.load(None, {}, home=Path("/srv/ada"))
    assert {**vars(example), "file": None} == vars(plain)
    assert plain.state_dir == Path("/srv/ada/.local/state/fleetune")


def test_plaintext_is_for_loopback_alone() -> None:
    with pytest.raises(ComplaintsError, match="fleetune init") as caught:
        config.load(None, {}, {"listen": "0.0.0.0:7433", "plaintext": True})
    assert [complaint.path for complaint in caught.value.complaints] == ["listen"]
    assert config.load(None, {}, {"listen": "127.0.0.1:7433", "plaintext": True}).plaintext
    assert config.load(None, {}, {"listen": "0.0.0.0:7433"}).listen == "0.0.0.0:7433"


@pytest.mark.parametrize(
    ("listen", "join_listen"), [("0.0.0.0:7433", "0.0.0.0:7434"), ("[::1]:9", "[::1]:10"), ("127.0.0.1:0", "127.0.0.1:0")]
)
def test_joining_has_the_next_port(listen: str, join_listen: str) -> None:
    assert config.load(None, {}, {"listen": listen}).join_listen == join_listen
    assert config.load(None, {}, {"listen": listen, "join_listen": "127.0.0.1:1"}).join_listen == "127.0.0.1:1"


def test_there_is_no_port_after_the_last_one() -> None:
    with pytest.raises(ComplaintsError, match="join_listen"):
        config.load(None, {}, {"listen": "127.0.0.1:65535"})


@pytest.mark.parametrize("address", ["0.0.0.0:7433", "[::]:7433", "192.0.2.7", "192.0.2.7:0"])
def test_nobody_can_dial_a_wildcard_or_no_port(address: str) -> None:
    with pytest.raises(ComplaintsError, match="address"):
        config.load(None, {}, {"address": address})


def test_the_files_of_another_authority_come_all_three_and_not_with_plaintext(tmp_path: Path) -> None:
    with pytest.raises(ComplaintsError, match=r"tls\.certificate and tls\.key"):
        config.load(None, {}, {"tls.roots": "r.pem"}, working_folder=tmp_path)
    files: dict[str, object] = {"tls.roots": "r.pem", "tls.certificate": "c.pem", "tls.key": "k.pem"}
    found = config.load(None, {}, files, working_folder=tmp_path).tls
    assert found == config.TlsFiles(tmp_path / "r.pem", tmp_path / "c.pem", tmp_path / "k.pem")
    with pytest.raises(ComplaintsError, match="plaintext"):
        config.load(None, {}, {**files, "plaintext": True}, working_folder=tmp_path)


@pytest.mark.parametrize("listen", ["localhost:1", "[::1]:7433", "127.0.0.1:0"])
def test_loopback_and_a_free_port_are_fine(listen: str) -> None:
    assert config.load(None, {}, {"listen": listen}).listen == listen


def test_every_mistake_is_told_at_once_with_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text('heartbeats = 3\nlease_s = "long"\n[log]\nlevel = "loud"\n')
    with pytest.raises(ComplaintsError) as caught:
        config.load(file, {"FLEETUNE_COORDINATOR_KEEP_ROUNDS": "0"})
    assert [complaint.path for complaint in caught.value.complaints] == [
        "heartbeats",
        "lease_s",
        "log.level",
        "FLEETUNE_COORDINATOR_KEEP_ROUNDS",
    ]


def test_a_lease_shorter_than_two_heartbeats_is_refused() -> None:
    with pytest.raises(ComplaintsError, match="twice heartbeat_s"):
        config.load(None, {}, {"heartbeat_s": 10})


def test_systemd_s_state_folder_is_taken_and_a_setting_goes_before() -> None:
    environment = {"STATE_DIRECTORY": "/var/lib/fleetune", "FLEETUNE_COORDINATOR_CONFIG": "x.toml"}
    assert config.load(None, environment).state_dir == Path("/var/lib/fleetune")
    assert config.load(None, environment, {"state_dir": "s"}, working_folder=Path("/w")).state_dir == Path("/w/s")


def test_a_kubernetes_service_variable_is_noted_and_no_mistake() -> None:
    loaded = config.load(None, {"FLEETUNE_COORDINATOR_PORT": "tcp://10.0.0.1:7433"})
    assert loaded.unused_environment == ("FLEETUNE_COORDINATOR_PORT",)
