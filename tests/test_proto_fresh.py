"""The committed code is what the .proto files generate today."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generated_in(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for pattern in GENERATED for file in folder.rglob(pattern)}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_generated_code_is_current(tmp_path: Path) -> None:
    # Our own make may run inside another one: its flags and job server are none of ours.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    made = subprocess.run(
        ["make", "generate-proto", f"OUT={tmp_path}", f"PY={sys.executable}"],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr

    fresh, committed = generated_in(tmp_path), generated_in(REPO / "proto")
    assert fresh
    assert sorted(fresh) == sorted(committed), "a file is missing, or its .proto is gone: run `make proto`"
    stale = [name for name in sorted(fresh) if fresh[name] != committed[name]]
    assert not stale, f"run `make proto`: {', '.join(stale)}"
