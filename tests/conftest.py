"""What every test stands on: nothing may outlive a test, and tests that need torch are left out where it is not installed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import inspect
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import psutil
import pytest
import pytest_asyncio

TESTS = Path(__file__).parent

# Of `make test`; each has torch and a model or two in memory.
MOST_WORKERS = 5

# The terminal that the tests are started from is no business of theirs; xdist's own processes always name a width.
for _name in ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(_name, None)

# A busy machine is no bug: hypothesis would count the time of each example, and that of drawing the first ones.
hypothesis.settings.register_profile("no-deadline", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("no-deadline")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: one more than there are cores, as most tests wait for a process, a disk or a peer now and then."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_WORKERS - 1) + 1


# ---------------------------------------------------------------------------------------------------- tests that need torch

TORCH_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))
# Whole folders whose subject loads a model, or starts a child process that does.
TORCH_FOLDERS = ("model", "agent/trainer", "agent/methods", "coordinator/modelhost", "e2e")
TORCH_MODULES = r"torch|transformers|peft|accelerate|fleetune\.model|support\.tiny_models"
TORCH_IMPORT = re.compile(rf"^\s*(?:import|from)\s+(?:{TORCH_MODULES})\b", re.MULTILINE)


def _needs_torch(file: Path) -> bool:
    place = file.relative_to(TESTS).as_posix()
    return place.startswith(tuple(f"{folder}/" for folder in TORCH_FOLDERS)) or TORCH_IMPORT.search(file.read_text()) is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if TORCH_INSTALLED:
        return None
    if collection_path.is_dir():  # left out whole, since its conftest.py makes models
        return True if collection_path.is_relative_to(TESTS) and collection_path.relative_to(TESTS).as_posix() in TORCH_FOLDERS else None
    if not (collection_path.name.startswith("test_") and collection_path.suffix == ".py"):
        return None
    return True if _needs_torch(collection_path) else None


def pytest_report_header() -> str | None:
    return None if TORCH_INSTALLED else "torch, transformers or peft is not installed: the tests that need them are left out"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    torch_files: dict[Path, bool] = {}
    for item in items:
        if torch_files.setdefault(item.path, TESTS in item.path.parents and _needs_torch(item.path)):
            item.add_marker("torch")
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj) and "no_leaked_tasks" not in item.fixturenames:
            item.fixturenames.insert(0, "no_leaked_tasks")


# ------------------------------------------------------------------------------------------------------------------- leaks

# What is given back in the background, or on another thread, gets this long before it counts as leaked.
GRACE_S = 20.0

# Threads of libraries that live as long as the process, by the name they bear.
LASTING_THREADS = re.compile(
    r"_poll_wrapper"  # grpc.aio: one thread polls for all channels and servers, ends some time after the last is collected
    r"|tqdm_monitor|TMonitor"  # progress bars of transformers: one watcher for the process
    r"|pytest_timeout"  # the timer of this very test
    r"|Dummy-"  # threads of gRPC's own that have called into Python, which keeps an entry for each
)
# Descriptors that libraries keep: the epoll, event and timer descriptors of grpc's event engine and of event loops, random devices,
# and what the kernel shows of the machine.
LASTING_FILES = re.compile(r"^anon_inode:|^/dev/(?:u?random|null|tty|nvidia\S*|shm/\S*)$|^/proc/|^/sys/")
# multiprocessing's own bookkeeper, one for the process.
LASTING_CHILDREN = re.compile(r"multiprocessing\.(?:resource_tracker|forkserver)")


@dataclass(frozen=True)
class Held:
    """What this process holds at one moment; each entry is an identity and the words for a person."""

    threads: frozenset[tuple[int, str]]
    children: frozenset[tuple[tuple[int, float], str]]
    files: frozenset[tuple[tuple[int, str], str]]

    def beyond(self, before: Held) -> Held:
        # By identity alone: the words of a process that was just started are not those of a moment later.
        known = {identity for identity, _ in before.children}
        children = frozenset(child for child in self.children if child[0] not in known)
        return Held(self.threads - before.threads, children, self.files - before.files)

    def and_also(self, other: Held) -> Held:
        return Held(self.threads | other.threads, self.children | other.children, self.files | other.files)

    def words(self) -> list[str]:
        return (
            [f"thread {name}" for _, name in sorted(self.threads)]
            + [f"child process {words}" for _, words in sorted(self.children)]
            + [f"open file {words}" for _, words in sorted(self.files)]
        )


NOTHING = Held(frozenset(), frozenset(), frozenset())


def _threads() -> Iterator[tuple[int, str]]:
    for thread in threading.enumerate():
        # Two descriptions, as some libraries name their thread and others only its function.
        words = f"{thread.name} {getattr(thread, '_target', None)!r}"
        if thread is not threading.main_thread() and not LASTING_THREADS.search(words):
            yield id(thread), thread.name


def _children(parent: psutil.Process | None = None) -> Iterator[tuple[tuple[int, float], str]]:
    """Every process below this one; not below a daemon that a shared fixture holds, whose children are its own business."""
    for child in (parent or psutil.Process()).children():
        try:
            words = " ".join(child.cmdline()) or f"{child.name()} ({child.status()})"
            identity = (child.pid, _began(child))
        except psutil.NoSuchProcess:
            continue
        if not LASTING_CHILDREN.search(words):
            yield identity, f"{child.pid}: {words[:200]}"
        if identity not in {shared for shared, _ in _shared[0].children}:
            yield from _below(child)


def _began(process: psutil.Process) -> float:
    """Tells a process from a later one with its number. Not by the wall clock, against which psutil reckons: that may be set meanwhile."""
    try:
        # Behind the name, which is in brackets and may hold anything: the 20th word is its start in ticks since the machine's.
        return float(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return process.create_time()


def _below(process: psutil.Process) -> Iterator[tuple[tuple[int, float], str]]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from _children(process)


def _files() -> Iterator[tuple[tuple[int, str], str]]:
    table = Path("/proc/self/fd")
    if not table.exists():  # macOS: the number of descriptors is not worth a false alarm
        return
    for name in os.listdir(table):
        try:
            target = os.readlink(table / name)
        except OSError:  # the descriptor of this very listing
            continue
        if target != f"/proc/{os.getpid()}/fd" and not LASTING_FILES.search(target):
            yield (int(name), target), f"{name} -> {target}"


def held_now() -> Held:
    return Held(frozenset(_threads()), frozenset(_children()), frozenset(_files()))


def leaked_since(before: Held) -> Held:
    """What is held beyond `before`, after the grace; returns at once when nothing is."""
    deadline = time.monotonic() + GRACE_S
    pause_s = 0.005
    extra = held_now().beyond(before)
    while extra != NOTHING and time.monotonic() < deadline:
        gc.collect()  # channels, servers and files in reference cycles
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.25)
        extra = held_now().beyond(before)
    return extra


_before = pytest.StashKey[Held]()
_passed = pytest.StashKey[bool]()
# What fixtures that outlive a test hold on purpose; they are answerable at the end of their own scope, not of the test that was first.
_shared = [NOTHING]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[_before] = held_now()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    if fixturedef.scope == "function":
        return (yield)
    before = held_now()
    try:
        return (yield)
    finally:
        _shared[0] = _shared[0].and_also(held_now().beyond(before))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_passed] = report.passed
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    outcome = yield
    # A failed test's traceback keeps its objects alive, and its own message is the one to read.
    if item.stash.get(_passed, False):
        if isinstance(item, pytest.Function):
            # pytest keeps the values of fixtures that are torn down; grpc.aio keeps its descriptors while any of its objects lives.
            item.funcargs.clear()
        leaked = leaked_since(item.stash[_before].and_also(_shared[0]))
        if leaked != NOTHING:
            pytest.fail("left behind by this test:\n  " + "\n  ".join(leaked.words()), pytrace=False)
    return outcome


def _task_words(task: asyncio.Task[object]) -> str:
    coroutine = task.get_coro()
    # Cython's coroutines do not say of which function they are in their repr.
    return f"{task.get_name()}: {getattr(coroutine, '__qualname__', '')} {coroutine!r}"


@pytest_asyncio.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Set up before and torn down after all other async fixtures of a test: by then every task must have ended."""
    before = asyncio.all_tasks()
    yield

    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    if left:  # grpc.aio ends the tasks of its own calls some turns after a channel or server is closed
        _, left = await asyncio.wait(left, timeout=GRACE_S)
    if left:
        pytest.fail("tasks left behind by this test:\n  " + "\n  ".join(sorted(map(_task_words, left))), pytrace=False)
