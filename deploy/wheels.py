#!/usr/bin/env python3
"""Which wheels a board needs: a table of those for aarch64, and a folder of them for a board without a network.

    deploy/wheels.py fill DIR --python 3.11 [--machine aarch64] [--role agent] [--wheel FILE]
    deploy/wheels.py table            asks the index and writes deploy/wheels-aarch64.tsv
    deploy/wheels.py check            asks the index and compares; exit code 1 where a wheel is missing, 75 where no index answers

What is asked is pip's own configured index. pip judges markers by the machine that it runs on, so the walk from package to package
is made here, with the markers of the board.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

REPO = Path(__file__).resolve().parents[1]
TABLE = REPO / "deploy" / "wheels-aarch64.tsv"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
"""JetPack 6, Raspberry Pi OS bookworm, JetPack 7, Raspberry Pi OS trixie."""

GLIBCS = (34, 31, 28, 27, 26, 24, 17)
"""Minor versions of the C library that wheels name; the oldest board's, JetPack 6 and bookworm, have 2.35 and 2.36."""

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "agent": ("train", "torch-cpu"),
    "coordinator": ("coordinator", "train", "torch-cpu"),
    "relay": (),
    "light": ("coordinator",),  # both daemons without torch, enough for `echo`
    "all": ("coordinator", "train", "torch-cpu", "parquet"),
}
NO_INDEX = 75
"""EX_TEMPFAIL: nothing is known, and nothing is wrong."""


class NoIndexError(Exception):
    """The index could not be asked."""


@dataclass(frozen=True)
class Board:
    """What markers and wheel tags are judged by."""

    machine: str
    python: str

    def markers(self) -> dict[str, str]:
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }

    def pip_words(self) -> list[str]:
        platforms = [f"manylinux_2_{minor}_{self.machine}" for minor in GLIBCS] + [f"manylinux2014_{self.machine}"]
        words = ["--only-binary=:all:", "--no-deps", "--implementation", "cp", "--python-version", self.python]
        return words + [word for platform in platforms for word in ("--platform", platform)]


@dataclass(frozen=True)
class Found:
    """One wheel that the index has for a board."""

    name: str
    version: str
    file: str


def applies(requirement: Requirement, board: Board, extras: Sequence[str] = ("",)) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**board.markers(), "extra": extra}) for extra in extras)


def pins(board: Board, text: str) -> dict[str, Requirement]:
    """Package -> the line of constraints.txt that holds for the board."""
    lines = (Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {canonicalize_name(line.name): line for line in lines if applies(line, board)}


def direct(board: Board, project: Mapping[str, object], extras: Sequence[str]) -> list[Requirement]:
    """What pyproject.toml asks for with these extras."""
    lines = list(project["dependencies"])  # type: ignore[call-overload]  # TOML
    for extra in extras:
        lines += project["optional-dependencies"][extra]  # type: ignore[index]
    return [line for line in map(Requirement, lines) if applies(line, board)]


def closure(board: Board, extras: Sequence[str]) -> tuple[list[Found], list[str]]:
    """(every wheel that the board installs, every pin without one)."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins(board, (REPO / "constraints.txt").read_text(encoding="utf-8"))
    found: dict[str, Found] = {}
    missing: list[str] = []
    seen: set[tuple[str, str]] = set()
    ahead = direct(board, project, extras)
    while ahead:
        asked: dict[str, set[str]] = {}
        for requirement in ahead:
            name = canonicalize_name(requirement.name)
            fresh = {extra for extra in ("", *requirement.extras) if (name, extra) not in seen}
            seen |= {(name, extra) for extra in fresh}
            if fresh:
                asked.setdefault(name, set()).update(fresh)
        unpinned = [name for name in asked if name not in pinned]
        if unpinned:
            raise SystemExit(f"constraints.txt pins no {', '.join(unpinned)} for {board.machine}, Python {board.python}.")
        wheels, lacking = ask(board, [str(pinned[name]).partition(";")[0].strip() for name in sorted(asked)])
        missing += lacking
        ahead = []
        for wheel, needs in wheels:
            name = canonicalize_name(wheel.name)
            found[name] = wheel
            ahead += [need for need in map(Requirement, needs) if applies(need, board, sorted(asked[name]))]
    return sorted(found.values(), key=lambda wheel: wheel.name), missing


def ask(board: Board, wanted: Sequence[str]) -> tuple[list[tuple[Found, list[str]]], list[str]]:
    """What the index has of `wanted`; all in one go, and one by one only where something is missing."""
    if not wanted:
        return [], []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report), "--target", folder]
        done = pip([*words, *board.pip_words(), *wanted])
        if done.returncode == 0:
            entries = json.loads(report.read_text(encoding="utf-8"))["install"]
            return [found_of(entry) for entry in entries], []
    if re.search(r"ConnectionError|NewConnectionError|Temporary failure|Max retries|Read timed out", done.stderr):
        raise NoIndexError(done.stderr.strip().splitlines()[-1])
    if len(wanted) == 1:
        return [], list(wanted)
    parts = [ask(board, [each]) for each in wanted]
    return [wheel for wheels, _ in parts for wheel in wheels], [name for _, names in parts for name in names]


def found_of(entry: Mapping[str, Mapping[str, object]]) -> tuple[Found, list[str]]:
    # The file's name alone: from where it came is this machine's business.
    file = str(entry["download_info"]["url"]).rpartition("/")[2].partition("#")[0].replace("%2B", "+")
    metadata = entry["metadata"]
    needs = metadata.get("requires_dist", [])
    assert isinstance(needs, list)
    return Found(str(metadata["name"]), str(metadata["version"]), file), [str(need) for need in needs]


def pip(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check", "--no-input"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fill(folder: Path, board: Board, role: str, wheel: Path | None) -> int:
    wheels, missing = closure(board, EXTRAS[role])
    if missing:
        print(f"no wheel for {board.machine}, Python {board.python}: {', '.join(missing)}", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{found.name}=={found.version}" for found in wheels]
    done = pip(["download", "--quiet", "--dest", str(folder), *board.pip_words(), *wanted])
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return 1
    if wheel is not None:
        shutil.copy(wheel, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels, {size / 1e6:.0f} MB, for {board.machine} and Python {board.python} in {folder}")
    if wheel is None:
        print("the wheel of Fleetune itself is not among them: `make wheel`, and copy dist/fleetune-*.whl into it")
    return 0


def tags_of(file: str) -> str:
    return file.removesuffix(".whl").split("-", 2)[2]


def table_now(machine: str = "aarch64") -> tuple[str, list[str]]:
    """(the table as text, complaints)."""
    rows: dict[str, dict[str, str]] = {}
    complaints: list[str] = []
    boards = [Board(machine, python) for python in PYTHONS]
    with ThreadPoolExecutor(len(boards)) as pool:  # it is the index that is waited for
        answers = list(pool.map(lambda board: closure(board, EXTRAS["all"]), boards))
    for python, (wheels, missing) in zip(PYTHONS, answers, strict=True):
        complaints += [f"Python {python}: no wheel of {name}" for name in missing]
        for wheel in wheels:
            _, version, _, tags = parse_wheel_filename(wheel.file)
            pure = all(tag.platform == "any" for tag in tags)
            rows.setdefault(canonicalize_name(wheel.name), {})[python] = f"{version} {'pure' if pure else tags_of(wheel.file)}"
    lines = ["\t".join(["package", *(f"Python {python}" for python in PYTHONS)])]
    lines += ["\t".join([name, *(rows[name].get(python, "-") for python in PYTHONS)]) for name in sorted(rows)]
    return "\n".join(lines) + "\n", complaints


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    filling = verbs.add_parser("fill", help="download the wheels of a board into a folder")
    filling.add_argument("folder", type=Path)
    filling.add_argument(
        "--python", choices=PYTHONS, required=True, help="the board's: 3.11 on bookworm, 3.13 on trixie, 3.10 on JetPack 6"
    )
    filling.add_argument("--machine", choices=["aarch64", "x86_64"], default="aarch64")
    filling.add_argument("--role", choices=sorted(EXTRAS), default="agent")
    filling.add_argument("--wheel", type=Path, help="fleetune-*.whl, to lie with them")
    verbs.add_parser("table", help="write deploy/wheels-aarch64.tsv")
    verbs.add_parser("check", help="compare it with the index")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.verb == "fill":
            return fill(chosen.folder, Board(chosen.machine, chosen.python), chosen.role, chosen.wheel)
        text, complaints = table_now()
    except NoIndexError as error:
        print(f"no index answers: {error}", file=sys.stderr)
        return NO_INDEX
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if chosen.verb == "table":
        TABLE.write_text(text, encoding="utf-8")
        print(f"{TABLE.relative_to(REPO)}: {len(text.splitlines()) - 1} packages")
    elif text != TABLE.read_text(encoding="utf-8"):
        print(f"{TABLE.relative_to(REPO)} is not what the index has now; `deploy/wheels.py table` writes it anew", file=sys.stderr)
        return 1
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
