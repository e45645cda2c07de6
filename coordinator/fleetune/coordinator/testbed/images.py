"""The image that every member of a testbed runs: named by what it is made of, and built when that has changed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed.engine import Engine, execute

NAME = "fleetune-testbed"
TARGET = "testbed"
DOCKERFILE = "deploy/docker/Dockerfile"
BUILD_S = 1800.0
SAID_LINES = 30

# What .dockerignore lets in, but for the wheels: which of those are taken, constraints.txt says.
_PARTS = (
    "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "proto", "agent", "coordinator",
    "deploy/install.sh", "deploy/systemd", "deploy/config", "deploy/docker",
)  # fmt: skip
_OURS = re.compile(rf"{NAME}:[0-9a-f]{{12}}")


def repository() -> Path | None:
    """The clone that this code lies in; None where it was installed from a wheel."""
    folder = Path(__file__).resolve().parents[4]
    return folder if (folder / DOCKERFILE).is_file() else None


def tag(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _sources(folder):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_mode & 0o111:o}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{NAME}:{digest.hexdigest()[:12]}"


def ensure(engine: Engine, given: str = "", base: str = "") -> str:
    """The image's name: the one given, else this clone's, built where it is not there; `base` in place of the Dockerfile's own."""
    folder = repository()
    if given:
        if not _there(engine, given):
            raise MachineError(
                f"the engine has no image {given}.", "`docker pull` or build it; `docker images` lists those that are there."
            )
        return given
    if folder is None:
        raise MachineError(
            "Fleetune was installed from a package, and the images are built from a clone.", "Name one with --option image=NAME."
        )
    name = tag(folder)
    if not _there(engine, name):
        _build(engine, folder, name, base)
        _forget_older(engine, name)
    return name


def build_command(folder: Path, name: str, base: str = "") -> list[str]:
    """Without a network where deploy/wheelhouse/ has wheels, with pip's index otherwise."""
    command = ["build", "--file", str(folder / DOCKERFILE), "--target", TARGET, "--tag", name]
    if any((folder / "deploy" / "wheelhouse").glob("torch-*.whl")):
        command += ["--network", "none", "--build-arg", "PIP_ARGS=--no-index"]
    if base:
        command += ["--build-arg", f"BASE={base}"]
    return [*command, str(folder)]


def _build(engine: Engine, folder: Path, name: str, base: str) -> None:
    print(f"building {name}; the first time takes minutes", file=sys.stderr, flush=True)
    command = [engine.program(), *build_command(folder, name, base)]
    done = _attempt(command, "1")
    if done.returncode and "buildx component is missing" in done.stderr:
        done = _attempt(command, "0")  # the older builder, which makes every stage up to this one
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-SAID_LINES:])
        remedy = "Without an index, deploy/docker/wheelhouse.sh fills deploy/wheelhouse/."
        raise MachineError(f"the image was not built. The builder said last:\n{said}\n", remedy)


def _attempt(command: list[str], buildkit: str) -> subprocess.CompletedProcess[str]:
    return execute(command, timeout_s=BUILD_S, check=False, environment={**os.environ, "DOCKER_BUILDKIT": buildkit})


def _forget_older(engine: Engine, name: str) -> None:
    """Those of earlier states of this clone that nothing runs from: the engine keeps the others by itself."""
    for other in engine.images():
        if _OURS.fullmatch(other) and other != name:
            engine.command("rmi", other, check=False)


def _there(engine: Engine, name: str) -> bool:
    return engine.ask(f"/images/{name}/json") is not None


def _sources(folder: Path) -> Iterator[Path]:
    for part in _PARTS:
        top = folder / part
        if top.is_file():
            yield top
        for root, folders, files in os.walk(top):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            yield from (Path(root) / name for name in sorted(files) if not name.endswith(".pyc"))
