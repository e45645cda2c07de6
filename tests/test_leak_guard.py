"""The guard in conftest.py finds what outlives a test, and leaves clean tests alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

SCENES = """
import asyncio, subprocess, sys, threading
import grpc, grpc.aio, pytest

kept = []
stop = threading.Event()

def test_leaks_a_thread():
    threading.Thread(target=stop.wait, args=(60,), daemon=True, name="left-thread").start()

def test_leaks_a_child():
    kept.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))

def test_leaks_a_file(tmp_path):
    kept.append(open(tmp_path / "left-file", "w"))

async def test_leaks_a_task():
    kept.append(asyncio.create_task(asyncio.sleep(60), name="left-task"))

def test_stops_what_was_left():
    stop.set()
    kept[0].communicate()

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with open(tmp_path_factory.mktemp("shared") / "file", "w") as file:
        yield file

def test_clean_with_a_shared_fixture(shared):
    shared.write("x")

async def test_clean_with_a_task_and_a_child():
    task = asyncio.create_task(asyncio.sleep(0))
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await child.wait()
    await asyncio.to_thread(int)
    await task

async def test_clean_with_a_grpc_server_and_a_call():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/nobody/home")(b"")
    await server.stop(0)

@pytest.fixture
async def ticking():
    task = asyncio.create_task(asyncio.sleep(60))
    yield
    task.cancel()

async def test_clean_with_a_task_of_a_fixture(ticking):
    pass
"""


def test_what_outlives_a_test_is_found_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text().replace("GRACE_S = 20.0", "GRACE_S = 0.3"))
    (tmp_path / "test_scenes.py").write_text(SCENES)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\nmarkers =\n  torch: as in the project\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-rE", "--no-header", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = sorted(line.split("::")[1].split(" ")[0] for line in run.stdout.splitlines() if line.startswith("ERROR "))
    assert errors == ["test_leaks_a_child", "test_leaks_a_file", "test_leaks_a_task", "test_leaks_a_thread"], run.stdout + run.stderr
    assert all(words in run.stdout for words in ("left-thread", "left-file", "left-task", "input()"))
