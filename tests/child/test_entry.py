"""The child's side of the protocol, in a child that is no more than the protocol."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune import errors
from fleetune.child import entry
from support.child_client import ChildClient

CHILD = """
    import os, sys
    from fleetune.child.entry import serve
    from fleetune.errors import DataError

    def echo(fields, emit):
        emit("progress", stage="training", done=1, total=2, loss=float("nan"))
        print("a library prints")
        os.write(1, b"and C code too\\n")
        return {"text": fields["text"]}

    def fail(fields, emit):
        emit("progress", stage="loading", done=0, total=1)
        raise DataError("The row is wrong.", "Correct it.")

    def stdin(fields, emit):
        return {"read": sys.stdin.read()}

    sys.exit(serve({"echo": echo, "fail": fail, "stdin": stdin}))
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChildClient]:
    (tmp_path / "small_child.py").write_text(textwrap.dedent(CHILD))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ChildClient("small_child") as client:
        yield client


def test_prints_of_libraries_do_not_reach_the_protocol(child: ChildClient) -> None:
    assert child.ask("echo", text="ä\u2028b") == {"id": 1, "result": {"text": "ä\u2028b"}}
    assert child.close_stdin() == 0
    assert child.process.stderr is not None
    assert child.process.stderr.read() == b"a library prints\nand C code too\n"


def test_events_carry_the_requests_id_and_no_nan(child: ChildClient) -> None:
    child.ask("echo", text="")
    assert child.events == [{"id": 1, "event": "progress", "stage": "training", "done": 1, "total": 2, "loss": None}]


def test_an_error_has_kind_stage_message_and_traceback(child: ChildClient) -> None:
    error = child.ask("fail")["error"]
    assert (error["kind"], error["stage"], error["message"]) == ("data", "load", "The row is wrong. Correct it.")
    assert "DataError" in error["traceback"]
    assert child.ask("echo", text="still here")["result"] == {"text": "still here"}


def test_an_unknown_request_names_the_known_ones(child: ChildClient) -> None:
    assert "echo, fail, stdin" in child.ask("train")["error"]["message"]


def test_a_line_that_is_no_request_is_answered(child: ChildClient) -> None:
    child.send_raw(b"[]\n")
    assert child.answer()["error"]["kind"] == "unsupported"
    child.send_raw(b"{nonsense\n")
    assert child.answer()["error"]["kind"] == "internal"


def test_handlers_cannot_read_the_requests(child: ChildClient) -> None:
    assert child.ask("stdin")["result"] == {"read": ""}


def test_the_end_of_requests_ends_the_child(child: ChildClient) -> None:
    child.ask("echo", text="")
    assert child.close_stdin() == 0


def test_ctrl_c_is_left_to_the_parent(child: ChildClient) -> None:
    child.ask("echo", text="")
    child.process.send_signal(signal.SIGINT)
    assert child.ask("echo", text="alive")["result"] == {"text": "alive"}


def test_sigterm_ends_the_child_without_a_trace(child: ChildClient) -> None:
    child.ask("echo", text="")
    child.process.terminate()
    assert child.process.wait(timeout=30) == -signal.SIGTERM
    assert child.process.stderr is not None
    assert b"Traceback" not in child.process.stderr.read()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the death signal is Linux's")
def test_a_killed_parent_takes_a_busy_child_with_it(tmp_path: Path) -> None:
    # The grandchild holds a pipe; its end shows that it has died, whoever reaps it.
    (tmp_path / "busy.py").write_text(
        "import time\nfrom fleetune.child.entry import serve\n"
        "def busy(fields, emit):\n    emit('progress', stage='training', done=0, total=1)\n    time.sleep(600)\n    return {}\n"
        "serve({'busy': busy})\n"
    )
    parent_code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'busy'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[int(sys.argv[1])])\n"
        'child.stdin.write(b\'{"id": 1, "op": "busy"}\\n\'); child.stdin.flush()\n'
        "child.stdout.readline(); print('busy', flush=True); time.sleep(600)\n"
    )
    reading, writing = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, str(writing)],
        stdout=subprocess.PIPE,
        pass_fds=[writing],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    os.close(writing)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"busy\n"
        parent.kill()
        assert os.read(reading, 1) == b""
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
        os.close(reading)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.DataError("x"), "data"),
        (errors.ModelError("x"), "model"),
        (errors.NotFiniteError("x"), "not_finite"),
        (errors.UnsupportedError("x"), "unsupported"),
        (errors.WireError("x"), "transfer"),
        (errors.DiskFullError("x"), "disk_full"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError("CUDA"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "out_of_memory"),
        (RuntimeError("MPS backend out of memory"), "out_of_memory"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "unsupported"),
        (ValueError("x"), "internal"),
    ],
)
def test_errors_map_to_kinds(error: Exception, kind: str) -> None:
    found = entry.describe_error(error, "train")
    assert found["kind"] == kind
    assert found["message"]
    json.dumps(found)
