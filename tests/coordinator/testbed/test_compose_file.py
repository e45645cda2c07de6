"""The compose file of a testbed says what its specification does, keeps to its own network, and gives a container no more than it needs."""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import composefile, engine, images
from fleetune.coordinator.testbed.backend import COORDINATOR, Place
from fleetune.coordinator.testbed.compose import FAULTS, ComposeBackend
from fleetune.coordinator.testbed.composefile import Plan
from fleetune.coordinator.testbed.spec import KINDS, DeviceSpec, TestbedSpec

PLAN = Plan("fleetune-testbed:0123456789ab", "198.18.7.0/24", 2.0, {"pi4-1": "/dev/loop3"})


def device(name: str, kind: str) -> DeviceSpec:
    of = KINDS[kind]
    return DeviceSpec(name, kind, of.cpus, of.memory_mib, of.up_mbit, of.down_mbit, of.latency_ms, of.disk_mib, 1.0)


def place(folder: Path) -> Place:
    spec = TestbedSpec("kitchen", 7, 1.5, 1024, "iid", 0.5, (device("pi4-1", "pi4"), device("orin-1", "orin-agx")))
    return Place(spec, folder, "ft1a2b3c", folder / "base" / "minilm", {})


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    return composefile.document(place(tmp_path), PLAN)


def test_every_device_has_the_quotas_of_its_kind_and_no_swap(document: dict[str, Any]) -> None:
    pi = document["services"]["pi4-1"]
    assert (pi["cpus"], pi["mem_limit"], pi["memswap_limit"]) == (0.5, "2048m", "2048m")
    assert (pi["environment"]["UP_MBIT"], pi["environment"]["DOWN_MBIT"]) == ("10", "40")


def test_no_quota_is_above_the_cores_of_the_engine_which_would_refuse_it(tmp_path: Path) -> None:
    services = composefile.document(place(tmp_path), replace(PLAN, cores=1.0))["services"]
    assert [services[name]["cpus"] for name in (COORDINATOR, "pi4-1", "orin-1")] == [1.0, 0.5, 1.0]


def test_all_addresses_lie_in_the_one_subnet_and_differ(document: dict[str, Any]) -> None:
    subnet = ipaddress.IPv4Network(PLAN.subnet)
    assert subnet.subnet_of(ipaddress.IPv4Network("198.18.0.0/15"))
    addresses = [ipaddress.IPv4Address(each["networks"]["link"]["ipv4_address"]) for each in document["services"].values()]
    assert len(set(addresses)) == 3
    assert all(address in subnet and address not in (subnet[0], subnet[1], subnet[-1]) for address in addresses)
    assert document["networks"]["link"]["ipam"] == {"config": [{"subnet": PLAN.subnet}]}


def test_the_network_has_no_way_out_and_no_port_is_open_on_the_host(document: dict[str, Any]) -> None:
    assert document["networks"]["link"]["internal"] is True
    assert not any("ports" in each or "network_mode" in each or "privileged" in each for each in document["services"].values())


def test_containers_lose_all_capabilities_but_those_that_shape_a_link_and_change_the_account(document: dict[str, Any]) -> None:
    for each in document["services"].values():
        assert each["cap_drop"] == ["ALL"]
        assert each["cap_add"] == ["KILL", "NET_ADMIN", "SETGID", "SETPCAP", "SETUID"]
        assert each["security_opt"] == ["no-new-privileges:true"]


def test_a_device_sees_its_own_settings_and_rows_alone(document: dict[str, Any], tmp_path: Path) -> None:
    pi = document["services"]["pi4-1"]
    assert pi["volumes"] == [
        "pi4-1:/var/lib/fleetune",
        "../config/pi4-1.toml:/testbed/config/pi4-1.toml:ro",
        "../data/pi4-1:/testbed/data/pi4-1:ro",
    ]
    assert str(tmp_path) not in json.dumps({name: each for name, each in document["services"].items() if name != COORDINATOR})


def test_the_coordinator_reads_what_the_job_names_where_the_job_names_it(document: dict[str, Any], tmp_path: Path) -> None:
    shared = document["services"][COORDINATOR]["volumes"][1:]
    assert shared == [f"{path}:{path}:ro" for path in (tmp_path / "data" / "test.jsonl", tmp_path / "base")]


def test_the_join_token_is_a_secret_of_the_devices_and_of_nobody_else(document: dict[str, Any]) -> None:
    assert document["secrets"] == {"fleetune_join": {"file": "./join-line"}}
    assert [name for name, each in document["services"].items() if each.get("secrets")] == ["pi4-1", "orin-1"]


def test_a_device_with_a_disk_of_its_own_keeps_its_state_there(document: dict[str, Any]) -> None:
    assert document["volumes"]["pi4-1"]["driver_opts"] == {"type": "ext4", "device": "/dev/loop3"}
    assert "driver_opts" not in document["volumes"]["orin-1"]


def test_everything_that_is_made_carries_the_label_that_down_looks_for(document: dict[str, Any]) -> None:
    made = [*document["services"].values(), *document["networks"].values(), *document["volumes"].values()]
    assert all(each["labels"][composefile.LABEL] == "ft1a2b3c" for each in made)
    assert [each["labels"][composefile.MEMBER_LABEL] for each in document["services"].values()] == list(document["services"])


def test_compose_takes_the_file(document: dict[str, Any], tmp_path: Path) -> None:
    if shutil.which("docker") is None and shutil.which("docker-compose") is None:
        pytest.skip("neither docker compose nor docker-compose is installed")
    try:
        compose = engine.compose_command()
    except MachineError as error:
        pytest.skip(str(error))
    (tmp_path / "compose.json").write_text(json.dumps(document))
    (tmp_path / "join-line").write_text("")
    done = subprocess.run(
        [*compose, "-p", "ft1a2b3c", "-f", str(tmp_path / "compose.json"), "config", "-q"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_disks_a_backend_does_not_offer_to_fill_them(tmp_path: Path) -> None:
    backend = ComposeBackend(place(tmp_path))
    assert backend.faults == FAULTS
    (tmp_path / "backend").mkdir()
    (tmp_path / "backend" / "plan.json").write_text(json.dumps({"image": "x", "subnet": PLAN.subnet, "cores": 2.0, "disks": {}}))
    assert backend.faults == FAULTS - {"fill_disk"}


def test_a_build_needs_no_network_where_the_wheels_lie_at_hand(tmp_path: Path) -> None:
    (tmp_path / "deploy" / "wheelhouse").mkdir(parents=True)
    assert "--network" not in images.build_command(tmp_path, "name:tag")
    (tmp_path / "deploy" / "wheelhouse" / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert images.build_command(tmp_path, "name:tag")[7:11] == ["--network", "none", "--build-arg", "PIP_ARGS=--no-index"]


def test_the_image_gets_another_name_when_a_source_changes_and_not_when_something_else_does(tmp_path: Path) -> None:
    (tmp_path / "proto").mkdir()
    source = tmp_path / "proto" / "one.py"
    source.write_text("a = 1\n")
    first = images.tag(tmp_path)
    (tmp_path / "proto" / "__pycache__").mkdir()
    (tmp_path / "proto" / "__pycache__" / "one.pyc").touch()
    (tmp_path / "notes.md").touch()
    assert images.tag(tmp_path) == first
    source.write_text("a = 2\n")
    assert images.tag(tmp_path) != first


def test_without_an_engine_the_message_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(MachineError, match=r"no Docker engine answers.*systemctl start docker"):
        ComposeBackend(place(tmp_path)).lives()


def test_an_engine_on_another_machine_is_refused_since_it_sees_no_folder_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.7:2376")
    with pytest.raises(MachineError, match="another machine"):
        ComposeBackend(place(tmp_path)).lives()
