"""The table of aarch64 wheels: current, whole, and made by the script that anybody can run again."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "deploy" / "wheels.py"


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_wheels", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def rows(wheels: ModuleType) -> dict[str, dict[str, str]]:
    """Package -> Python -> cell."""
    head, *lines = [line.split("\t") for line in wheels.TABLE.read_text(encoding="utf-8").splitlines()]
    return {name: dict(zip((word.removeprefix("Python ") for word in head[1:]), cells, strict=True)) for name, *cells in lines}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_pin_that_a_board_installs_has_a_wheel_for_it(wheels: ModuleType, python: str) -> None:
    board = wheels.Board("aarch64", python)
    pinned = wheels.pins(board, (REPO / "constraints.txt").read_text(encoding="utf-8"))
    stale = []
    for name, cells in rows(wheels).items():
        if cells[python] != "-":
            version, _, tags = cells[python].partition(" ")
            assert tags == "pure" or "aarch64" in tags, f"{name}: {tags}"
            if name not in pinned or not pinned[name].specifier.contains(version):
                stale.append(f"{name} {version}")
    assert stale == [], "constraints.txt has moved on: `.venv/bin/python deploy/wheels.py table`"


@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_every_direct_dependency_stands_in_the_table(wheels: ModuleType, python: str) -> None:
    board = wheels.Board("aarch64", python)
    table = rows(wheels)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = wheels.direct(board, project, wheels.EXTRAS["all"])
    absent = [each.name for each in direct if table.get(canonicalize_name(each.name), {}).get(python, "-") == "-"]
    assert absent == [], "pyproject.toml has moved on: `.venv/bin/python deploy/wheels.py table`"


def test_no_board_s_torch_is_a_cuda_build(wheels: ModuleType) -> None:
    assert not [name for name in rows(wheels) if name.startswith(("nvidia", "cuda", "triton"))]


def test_markers_are_those_of_the_board_and_not_of_this_machine(wheels: ModuleType) -> None:
    line = Requirement("torch<2.10 ; sys_platform == 'linux' and platform_machine == 'aarch64' and python_version < '3.11'")
    assert wheels.applies(line, wheels.Board("aarch64", "3.10"))
    assert not wheels.applies(line, wheels.Board("aarch64", "3.11"))
    assert not wheels.applies(line, wheels.Board("x86_64", "3.10"))


def test_a_dependency_of_an_extra_counts_where_the_extra_is_asked_for(wheels: ModuleType) -> None:
    line, board = Requirement("certifi ; extra == 'ssl'"), wheels.Board("aarch64", "3.11")
    assert not wheels.applies(line, board)
    assert wheels.applies(line, board, ["", "ssl"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_index_has_every_wheel_of_the_table_today(wheels: ModuleType) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "check"], capture_output=True, text=True, check=False)
    if done.returncode == wheels.NO_INDEX:
        pytest.skip(f"no package index can be reached: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
