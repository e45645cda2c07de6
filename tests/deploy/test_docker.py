"""The images' files build with every builder and without a network, and the compose files are what compose takes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "deploy" / "docker"
COMPOSE = REPO / "deploy" / "compose.yaml"
DOCKERFILES = ("Dockerfile", "Dockerfile.jetson")
# The keys of a service that docker-compose 1.29 and the plug-in both know and these files need.
SERVICE_KEYS = {
    "image", "build", "command", "init", "restart", "stop_grace_period", "environment", "ports", "volumes", "read_only", "tmpfs",
    "cap_drop", "security_opt", "logging", "secrets", "profiles", "network_mode", "depends_on", "healthcheck",
}  # fmt: skip


def instructions(name: str) -> list[tuple[str, str]]:
    """(word, rest) of each, with continued lines joined."""
    text = re.sub(r"\\\n", " ", (DOCKER / name).read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_no_dockerfile_needs_a_frontend_from_elsewhere_or_one_builder(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert not re.search(r"^#\s*syntax\s*=", text, re.MULTILINE | re.IGNORECASE)
    assert all("--mount" not in rest and "<<" not in rest for word, rest in instructions(name) if word == "RUN")
    assert not [word for word, rest in instructions(name) if word in ("COPY", "ADD") and ("--link" in rest or "--chmod" in rest)]
    assert "ADD" not in [word for word, _ in instructions(name)]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_base_is_pinned_to_a_version(name: str) -> None:
    bases = [rest.partition("=")[2] for word, rest in instructions(name) if word == "ARG" and rest.startswith("BASE=")]
    assert bases
    assert all(re.search(r":[^:]*\d", base) and not base.endswith(":latest") for base in bases)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_image_that_people_run_has_an_account_of_its_own_and_a_health_check(name: str) -> None:
    stages: dict[str, list[tuple[str, str]]] = {}
    parents: dict[str, str] = {}
    stage = ""
    for word, rest in instructions(name):
        if word == "FROM":
            parent, _, stage = rest.partition(" AS ")
            stages[stage], parents[stage] = [], parent
        elif stage:
            stages[stage].append((word, rest))
    images = [each for each in stages if each.startswith(("agent", "coordinator")) and not each.endswith("-packages")]
    assert images
    for image in images:
        words = [word for word, _ in stages[image]]
        assert "HEALTHCHECK" in words, image
        assert [rest for word, rest in stages[image] if word == "USER"] == ["fleetune"], image


@pytest.mark.parametrize("name", DOCKERFILES)
def test_all_that_is_copied_passes_the_ignore_file_and_is_there(name: str) -> None:
    allowed = [line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions(name):
        if word != "COPY" or rest.startswith("--from"):
            continue
        for source in rest.split()[:-1]:
            plain = source.rstrip("/")
            assert any(plain == each or plain.startswith(f"{each}/") for each in allowed), source
            assert "*" in plain or (REPO / plain).exists(), source


def test_the_ignore_file_lets_nothing_in_that_is_not_named() -> None:
    lines = [line for line in (REPO / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"


def test_the_requirements_are_those_of_the_project() -> None:
    done = subprocess.run([sys.executable, str(DOCKER / "requirements.py"), "train"], capture_output=True, text=True, check=True)
    names = {re.split(r"[<>=\[ ]", line)[0] for line in done.stdout.splitlines()}
    assert {"grpcio", "transformers", "peft"} <= names
    assert "torch" not in names
    assert "sqlalchemy" not in names


def services() -> dict[str, dict[str, Any]]:
    document = yaml.safe_load(COMPOSE.read_text())
    assert set(document) == {"services", "secrets", "volumes"}
    found: dict[str, dict[str, Any]] = document["services"]
    return found


def test_compose_takes_the_production_file() -> None:
    tries = [["docker", "compose"], ["docker-compose"]]
    found = [
        words for words in tries if shutil.which(words[0]) and subprocess.run([*words, "version"], capture_output=True).returncode == 0
    ]
    if not found:
        pytest.skip("neither docker compose nor docker-compose is installed")
    for words in found:
        command = [*words, "-f", str(COMPOSE), *(["--profile", "monitoring"]), "config", "-q"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_services_use_only_what_both_generations_of_compose_know() -> None:
    for name, service in services().items():
        assert set(service) <= SERVICE_KEYS, name


def test_services_run_without_capabilities_and_write_their_volumes_alone() -> None:
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if name in ("coordinator", "agent"):
            assert service["read_only"] is True, name


def test_only_loopback_is_published_unless_somebody_says_otherwise() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith(("127.0.0.1:", "${FLEETUNE_LISTEN:-127.0.0.1}:")) for port in ports)


def test_every_file_that_a_service_mounts_is_there() -> None:
    for service in services().values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (COMPOSE.parent / source).exists(), source


def test_images_of_others_are_pinned_to_a_version() -> None:
    for name in ("prometheus", "grafana"):
        assert re.search(r":v?\d+\.\d+\.\d+$", services()[name]["image"])


def test_monitoring_is_off_unless_asked_for_and_grafana_finds_what_it_is_provisioned_with() -> None:
    found = services()
    assert [name for name, service in found.items() if service.get("profiles") == ["monitoring"]] == ["prometheus", "grafana"]
    provisioned = yaml.safe_load((REPO / "deploy/grafana/provisioning/dashboards/fleetune.yml").read_text())
    path = provisioned["providers"][0]["options"]["path"]
    assert any(volume.split(":")[1] == path for volume in found["grafana"]["volumes"])


# ------------------------------------------------------------------------------------------------------------------- watched.py

DAEMON = """
import os, signal, socket, sys, time
def said(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        own.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
said("READY=1\\nSTATUS=idle")
print("told", flush=True)
while True:  # a signal just before signal.pause() would not end that
    time.sleep(0.05)
"""


def watched(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "FLEETUNE_WATCH_DIR": str(folder / "watch")}
    return subprocess.Popen(
        [sys.executable, "-IS", str(DOCKER / "watched.py"), *arguments], stdout=subprocess.PIPE, env=environment, text=True
    )


def checked(folder: Path) -> tuple[int, str]:
    with watched(folder, "--check") as check:
        said, _ = check.communicate()
        return check.returncode, said


def test_a_watched_daemon_is_healthy_once_it_is_ready_and_its_exit_code_is_handed_on(tmp_path: Path) -> None:
    assert checked(tmp_path) == (1, "not ready: nothing was heard of it yet\n")
    with watched(tmp_path, "--", sys.executable, "-c", DAEMON) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "told\n"
        while not (tmp_path / "watch" / "last").exists():
            assert daemon.poll() is None
            time.sleep(0.01)
        code, said = checked(tmp_path)
        assert (code, said[:12]) == (0, "ready: idle,")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=180) == 7


def test_a_daemon_whose_pings_stay_away_is_unhealthy(tmp_path: Path) -> None:
    folder = tmp_path / "watch"
    folder.mkdir()
    (folder / "last").write_text("ready\nidle")
    os.utime(folder / "last", (0, 0))
    assert checked(tmp_path)[0] == 1


def test_a_container_that_is_killed_ends_with_the_code_that_docker_gives_for_it(tmp_path: Path) -> None:
    with watched(tmp_path, "--", sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)") as daemon:
        assert daemon.wait(timeout=180) == 137
