"""A Docker engine on this machine: its command for what changes something, its socket for what is only looked at, many times."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import quote, urlencode

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import plain

COMMAND_S = 60.0
ASK_S = 20.0
API = "/v1.41"
"""Of engine 20.10, the first that gives figures at once (`one-shot`)."""

SAID_CHARACTERS = 2000


@dataclass(frozen=True)
class Facts:
    """Of the engine."""

    version: str
    cores: int
    memory_bytes: int


class Engine:
    """Looks for nothing before it is asked. MachineError says what is missing, and what would help."""

    def __init__(self) -> None:
        self._socket: str | None = None

    def program(self) -> str:
        """Where `docker` is."""
        return _docker()

    def command(
        self, *arguments: str, stdin: str = "", timeout_s: float = COMMAND_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`docker ARGUMENTS...`."""
        return execute([_docker(), *arguments], stdin=stdin, timeout_s=timeout_s, check=check)

    def facts(self) -> Facts:
        found = plain.table(self.ask("/info"))
        if plain.text(found.get("OSType")) != "linux":
            raise MachineError(f"this engine runs {found.get('OSType')} containers.", "Switch it to Linux containers.")
        return Facts(plain.text(found.get("ServerVersion")), plain.count(found.get("NCPU")), plain.count(found.get("MemTotal")))

    def containers(self, label: str) -> Sequence[Mapping[str, object]]:
        """All that carry `label` ("name=value"), running or not, as the engine lists them."""
        return plain.tables(self.ask("/containers/json", all="1", filters=json.dumps({"label": [label]})))

    def volumes(self, label: str) -> list[str]:
        found = plain.table(self.ask("/volumes", filters=json.dumps({"label": [label]})))
        return [plain.text(each.get("Name")) for each in plain.tables(found.get("Volumes"))]

    def networks(self, label: str | None = None) -> Sequence[Mapping[str, object]]:
        return plain.tables(self.ask("/networks", **({} if label is None else {"filters": json.dumps({"label": [label]})})))

    def images(self) -> list[str]:
        """Their names with tags."""
        found = plain.tables(self.ask("/images/json"))
        return [plain.text(name) for image in found for name in cast("list[object]", image.get("RepoTags") or [])]

    def stats(self, container: str) -> Mapping[str, object]:
        return plain.table(self.ask(f"/containers/{quote(container)}/stats", **{"stream": "false", "one-shot": "true"}))

    def inspect(self, container: str) -> Mapping[str, object]:
        return plain.table(self.ask(f"/containers/{quote(container)}/json"))

    def ask(self, path: str, **query: str) -> object:
        """GET of the engine's API. None where it knows no such thing."""
        if self._socket is None:
            self._socket = _socket_of_engine()
        connection = _Connection(self._socket)
        try:
            connection.request("GET", API + path + (f"?{urlencode(query)}" if query else ""))
            answer = connection.getresponse()
            body = answer.read()
        except PermissionError as error:
            raise MachineError(
                f"the Docker engine at {self._socket} lets only members of its group in.",
                "`sudo usermod -aG docker $USER` and log in again; that group is as good as root. Or take the process backend.",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise MachineError(
                f"no Docker engine answers at {self._socket} ({error}).", "Start it (`systemctl start docker`), or take another --backend."
            ) from error
        finally:
            connection.close()
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise MachineError(
                f"the Docker engine refused GET {path}: {body[:200].decode('utf-8', 'replace')}.", "It must be 20.10 or later."
            )
        return json.loads(body)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("docker", timeout=ASK_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(ASK_S)
        self.sock.connect(self._path)


def execute(
    command: Sequence[str], *, timeout_s: float, stdin: str = "", check: bool = True, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """MachineError where it takes too long, or, with `check`, ends badly; with what it said last."""
    words = " ".join(command[:6]) + (" ..." if len(command) > 6 else "")
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, errors="replace", check=False, timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"`{words}` did not end within {timeout_s:g} s.", "See what the engine is busy with: `docker ps`, its log."
        ) from error
    if check and done.returncode:
        raise MachineError(f"`{words}` ended with {done.returncode}: {(done.stderr or done.stdout)[-SAID_CHARACTERS:].strip()}.")
    return done


def compose_command() -> list[str]:
    """`docker compose` where the plug-in is there, else docker-compose."""
    tries = [[shutil.which("docker") or "", "compose"], [shutil.which("docker-compose") or ""]]
    for words in tries:
        if words[0] and execute([*words, "version"], timeout_s=COMMAND_S, check=False).returncode == 0:
            return words
    raise MachineError(
        "neither `docker compose` nor docker-compose is installed.",
        "Debian and Ubuntu: apt install docker-compose (or docker-compose-plugin of Docker's own packages).",
    )


def _docker() -> str:
    found = shutil.which("docker")
    if found is None:
        raise MachineError(
            "docker is not installed.", "Debian and Ubuntu: apt install docker.io docker-compose; or take another --backend."
        )
    return found


def _socket_of_engine() -> str:
    # The context says it where DOCKER_HOST does not.
    host = os.environ.get("DOCKER_HOST") or ""
    if not host:
        done = execute([_docker(), "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"], timeout_s=COMMAND_S, check=False)
        host = done.stdout.strip() or "unix:///var/run/docker.sock"
    if not host.startswith("unix://"):
        raise MachineError(
            f"docker talks to {host}, another machine, which does not see the testbed's folder.", "Take this machine's engine: DOCKER_HOST."
        )
    return host[len("unix://") :]
