"""deploy/install.sh for real, into a folder of the test's, from wheels made by hand: no index is asked, nothing else is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import stub_wheels

REPO = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the installer is for Linux"),
]


@dataclass
class Place:
    """A prefix, a folder of wheels, and a root for units and settings."""

    folder: Path

    @property
    def prefix(self) -> Path:
        return self.folder / "prefix"

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def install(self, *options: str, code: int = 0) -> str:
        """What it said, after it ended with `code`."""
        command = ["sh", str(REPO / "deploy" / "install.sh"), "--prefix", str(self.prefix), *options]
        if not {"--rollback", "--uninstall"} & set(options):
            command += ["--offline", str(self.wheels), "--python", sys.executable]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLEETUNE_", "PIP_CONSTRAINT"))}
        # A constraint of this machine's own pip could rule out the versions made here.
        kept |= {"DESTDIR": str(self.root), "PIP_CONFIG_FILE": os.devnull, "FLEETUNE_FREE_MIB": "50000"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def runs(self) -> str:
        """What the installed command tells of itself."""
        program = self.prefix / "current" / "bin" / "fleetune-agent"
        return subprocess.run([program, "version"], capture_output=True, text=True, check=True).stdout.strip()

    @property
    def versions(self) -> list[str]:
        return sorted(folder.name.partition("-")[0] for folder in (self.prefix / "versions").iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    stub_wheels.fleetune(made.wheels, "1.0.0")
    stub_wheels.torch(made.wheels)
    return made


def test_installed_upgraded_rolled_back_and_removed_with_settings_kept_until_purged(place: Place) -> None:
    place.install("--memory-max", "900M")
    assert place.runs == "fleetune 1.0.0"
    unit = (place.root / "etc/systemd/system/fleetune-agent.service").read_text()
    assert f"ExecStart={place.prefix}/current/bin/fleetune-agent run" in unit and "/opt/fleetune/" not in unit
    limit = (place.root / "etc/systemd/system/fleetune-agent.service.d/50-memory.conf").read_text()
    assert "\nMemoryMax=900M\n" in limit and "MemoryHigh=" not in limit.replace("above MemoryHigh", "")
    settings = place.root / "etc/fleetune/agent.toml"
    assert '\nstate_dir = "/var/lib/fleetune-agent"' in settings.read_text()
    assert os.readlink(place.root / "usr/local/bin/fleetune-agent") == f"{place.prefix}/current/bin/fleetune-agent"

    first = os.readlink(place.prefix / "current")
    assert "installed already" in place.install()
    assert os.readlink(place.prefix / "current") == first

    settings.write_text("# the owner's own\n")
    stub_wheels.fleetune(place.wheels, "1.1.0")
    place.install()
    assert place.runs == "fleetune 1.1.0"
    assert place.versions == ["1.0.0", "1.1.0"]
    assert settings.read_text() == "# the owner's own\n"

    place.install("--rollback")
    assert place.runs == "fleetune 1.0.0"
    place.install("--rollback")
    assert place.runs == "fleetune 1.1.0"

    stub_wheels.fleetune(place.wheels, "1.2.0")
    place.install()
    assert place.versions == ["1.1.0", "1.2.0"]  # one to go back to, no more: cards are small

    place.install("--uninstall")
    assert not place.prefix.exists()
    assert settings.exists() and not (place.root / "etc/systemd/system/fleetune-agent.service").exists()


def test_purging_takes_the_settings_too(place: Place) -> None:
    place.install("--torch", "none")
    place.install("--uninstall", "--purge")
    assert [path for path in place.root.rglob("*") if path.is_file() or path.is_symlink()] == []


@pytest.mark.parametrize(
    ("cuda", "needs"),
    [("13.0", ["nvidia-cudnn-cu13; platform_system == 'Linux'", "triton"]), ("13.0", []), (None, ["cuda-toolkit==13.0"])],
    ids=["cuda build with packages", "cuda build without", "cpu build with packages"],
)
def test_a_torch_for_cuda_is_refused_and_leaves_nothing(place: Place, cuda: str | None, needs: list[str]) -> None:
    stub_wheels.torch(place.wheels, cuda=cuda, needs=needs)
    for name in ("nvidia_cudnn_cu13", "triton", "cuda_toolkit"):
        stub_wheels.wheel(place.wheels, name, "13.0", {f"{name}.py": ""})
    assert "is not for this machine" in place.install(code=6)
    assert not (place.prefix / "current").exists()
    assert list((place.prefix / "versions").iterdir()) == []


def test_a_cpu_build_is_refused_where_cuda_was_asked_for(place: Place) -> None:
    assert "CPU build" in place.install("--torch", "cuda", code=6)


def test_a_torch_that_dies_of_an_illegal_instruction_leaves_the_version_before_at_work(place: Place) -> None:
    place.install()
    stub_wheels.torch(place.wheels, "2.10.0", works=False)
    stub_wheels.fleetune(place.wheels, "1.1.0", torch="2.10.0")
    assert "illegal instruction" in place.install(code=7)
    assert place.runs == "fleetune 1.0.0"
    assert place.versions == ["1.0.0"]


def test_a_program_that_does_not_start_leaves_the_version_before_at_work(place: Place) -> None:
    place.install("--torch", "none")
    stub_wheels.fleetune(place.wheels, "1.1.0", status=3)
    assert "does not start" in place.install(code=7)
    assert place.runs == "fleetune 1.0.0"


def test_a_folder_that_lacks_a_wheel_is_told_by_the_name_of_what_is_missing(place: Place) -> None:
    next(place.wheels.glob("torch-*")).unlink()
    words = place.install(code=4)
    assert "torch==2.9.1 cannot be installed from" in words
    assert not (place.prefix / "current").exists()


def test_a_machine_may_do_both_and_stop_doing_one(place: Place) -> None:
    place.install()
    words = place.install("--role", "coordinator")
    assert "with coordinator,train" in words
    units = place.root / "etc/systemd/system"
    assert sorted(unit.name for unit in units.glob("*.service")) == ["fleetune-agent.service", "fleetune-coordinator.service"]
    assert "installed already" in place.install()  # neither role undoes the other's packages
    place.install("--uninstall", "--role", "agent")
    assert [unit.name for unit in units.glob("*.service")] == ["fleetune-coordinator.service"]
    assert place.runs == "fleetune 1.0.0"


def test_without_systemd_only_the_prefix_is_written(place: Place) -> None:
    place.install("--no-systemd", "--torch", "none")
    assert not place.root.exists()
    place.install("--torch", "none")  # an upgrade needs no word of it
    assert not place.root.exists()
