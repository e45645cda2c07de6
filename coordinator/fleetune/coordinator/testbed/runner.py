"""One run: a job handed in, faults made, everybody's counters read each second, all of it told into DIR/run.jsonl."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from fleetune.coordinator.faults import FolderInUseError, MachineError
from fleetune.coordinator.testbed import procs, record, view
from fleetune.coordinator.testbed.backend import Backend
from fleetune.coordinator.testbed.injector import Injector
from fleetune.coordinator.testbed.schedule import Act
from fleetune.coordinator.testbed.statefile import Kept, write_json
from fleetune.errors import ConfigError
from fleetune.waiting import within
from fleetune.workers import Workers

RUN_FILE = "run.jsonl"
RUNNING_FILE = "running.json"
SAMPLE_S = 1.0
ASK_S = 120.0
AGAIN_S = 2.0
AWAY_S = 180.0
"""A coordinator that was killed is started again well within this."""

LINE_BYTES_MAX = 64 << 20
"""A job of many rounds and devices in one line."""

Say = Callable[[str], None]


@dataclass
class Run:
    """What is known while it goes on. Written by the run alone, read by the picture."""

    job_id: str
    began_unix_s: float
    job: dict[str, Any] = field(default_factory=dict[str, Any])
    sample: record.Sampled | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the first round begins: the model is prepared, and devices are told to train."""


@dataclass(frozen=True)
class Outcome:
    """How it ended. `status` is the job's state word."""

    status: str
    file: Path


async def run(kept: Kept, backend: Backend, job_toml: str, acts: Sequence[Act], say: Say, look: Callable[[Run], None]) -> Outcome:
    """Until the job has ended. `look` is called each second. Cancelled, it undoes open faults, and the job goes on."""
    file = kept.place.folder / RUN_FILE
    with _alone(kept.place.folder), file.open("w", encoding="utf-8") as out:
        job_id = json.loads(await ask(backend, "submit", "-", "--json", stdin=job_toml))["job_id"]
        state = Run(job_id, time.time())
        machine = backend.machine()
        plain = [asdict(act) for act in acts]
        began = record.Began(state.began_unix_s, backend.name, kept.place.spec.plain(), plain, machine, job_id, job_toml)
        _write(out, began)
        say(f"job {job_id}, told into {file}")

        def heard(acted: record.Acted) -> None:
            _write(out, acted)
            say(f"! {acted.member}: {acted.act.replace('_', ' ')}: {acted.text}")

        injector = Injector(backend, kept.place.spec, acts, heard)
        tasks = [asyncio.ensure_future(work) for work in (_sampled(backend, state, out, look), _injected(state, injector))]
        try:
            await _followed(backend, state, say, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await injector.undo()
            injector.close()
        # What the last round was is only in the whole report.
        report = json.loads(await ask(backend, "report", job_id, "--json"))
        devices = json.loads(await ask(backend, "devices", "--json"))["devices"]
        state.sample = await sample(backend, state.job)
        _write(out, state.sample)
        look(state)
        notes = [*injector.notes, "The history is checked when the coordinator has been stopped: `fleetune testbed down`."]
        _write(out, record.Ended(time.time(), report["state"], report, devices, [], notes))
        return Outcome(report["state"], file)


async def chaos(kept: Kept, backend: Backend, acts: Sequence[Act], say: Say) -> list[str]:
    """Faults alone, told into the record of a run that is under way. What could not be done, in words."""

    def heard(acted: record.Acted) -> None:
        say(f"! {acted.member}: {acted.act.replace('_', ' ')}: {acted.text}")
        if running(kept.place.folder):
            with (kept.place.folder / RUN_FILE).open("a", encoding="utf-8") as out:
                _write(out, acted)

    injector = Injector(backend, kept.place.spec, acts, heard)
    try:
        await injector.run()
    finally:
        await injector.undo()
        injector.close()
    return injector.notes


def running(folder: Path) -> bool:
    """Whether a run is under way there."""
    try:
        document = json.loads((folder / RUNNING_FILE).read_text(encoding="utf-8"))
        return procs.alive(int(document["pid"]), int(document["start_ticks"]))
    except (FileNotFoundError, ValueError, KeyError):
        return False


def interruptible(work: Coroutine[Any, Any, Any]) -> Any:  # Any: what the work gives
    """asyncio.run, where the first SIGINT, SIGTERM or SIGHUP cancels and lets it clean up. KeyboardInterrupt then."""

    async def main() -> Any:
        task = asyncio.ensure_future(work)
        received: list[signal.Signals] = []

        def stop(number: signal.Signals) -> None:
            if not received:
                task.cancel()
            received.append(number)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop, number)
        try:
            return await task
        except asyncio.CancelledError:
            if received:
                raise KeyboardInterrupt from None
            raise

    return asyncio.run(main())


@contextlib.contextmanager
def terminated_as_interrupt() -> Generator[None, None, None]:
    """SIGTERM and SIGHUP as KeyboardInterrupt, for work that undoes itself."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _followed(backend: Backend, state: Run, say: Say, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Until the job has ended; a coordinator that is away is asked again. MachineError where it stays away."""
    news = view.News()
    heard_s = time.monotonic()
    while True:
        process = await asyncio.create_subprocess_exec(
            *backend.verb("watch", state.job_id, "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LINE_BYTES_MAX,
            start_new_session=True,
        )
        assert process.stdout is not None
        trouble = ""
        try:
            while line := await process.stdout.readline():
                job = _job(line)
                if job is None:  # an error, over several lines
                    trouble = (line + await process.stdout.read()).decode("utf-8", "replace")
                    break
                heard_s = time.monotonic()
                state.job = job
                if view.began(job):
                    state.begun.set()
                for text in news.lines(job):
                    say(text)
                for task in tasks:
                    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                        raise error
                if job["state"] in view.ENDED:
                    return
        finally:
            await _end(process)
        if time.monotonic() - heard_s > AWAY_S:
            raise MachineError(
                f"the coordinator has not answered for {AWAY_S:g} s: {_said(trouble)}", "`fleetune testbed status` says who lives."
            )
        await asyncio.sleep(AGAIN_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        # Not its own `kill`, which asks first how it does: the answer of one that has just ended is then missed by the event loop.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()


def _job(line: bytes) -> dict[str, Any] | None:
    try:
        document = cast("object", json.loads(line))
    except ValueError:
        return None
    return cast("dict[str, Any]", document) if isinstance(document, dict) and "state" in document else None


def _said(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"]["message"])
    return text.strip() or "it said nothing"


async def _injected(state: Run, injector: Injector) -> None:
    # How long a model takes to prepare depends on the machine; what goes wrong is meant for the training.
    await state.begun.wait()
    await injector.run()


async def _sampled(backend: Backend, state: Run, out: TextIO, look: Callable[[Run], None]) -> None:
    workers = Workers("sampler")
    try:
        due_s = time.monotonic()
        while True:
            state.sample = await _sample(backend, state.job, workers)
            _write(out, state.sample)
            look(state)
            due_s = max(due_s + SAMPLE_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
    finally:
        workers.close()


async def _sample(backend: Backend, job: Mapping[str, Any], workers: Workers) -> record.Sampled:
    members = await workers.run(backend.samples)
    lives = await workers.run(backend.lives)
    stages = view.stages(job) if job else {}
    number, phase = (view.round_number(job), view.phase(job)) if job else (0, "idle")
    return record.Sampled(time.time(), dict(members), {name: str(life) for name, life in lives.items()}, stages, number, phase)


async def sample(backend: Backend, job: Mapping[str, Any]) -> record.Sampled:
    """Everybody's counters now; `job` is the newest as `fleetune jobs --json` tells it, empty where there is none."""
    workers = Workers("sampler")
    try:
        return await _sample(backend, job, workers)
    finally:
        workers.close()


async def ask(backend: Backend, *arguments: str, stdin: str = "") -> str:
    """What a verb prints. The error it names, where it fails."""
    process = await asyncio.create_subprocess_exec(
        *backend.verb(*arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = await within(ASK_S, process.communicate(stdin.encode()))
    except asyncio.TimeoutError:
        raise MachineError(f"`fleetune {' '.join(arguments)}` did not end within {ASK_S:g} s.") from None
    finally:
        await _end(process)
    if process.returncode:
        raise _failed(arguments, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), process.returncode)
    return out.decode("utf-8")


def _failed(arguments: Sequence[str], out: str, err: str, code: int) -> ConfigError | MachineError:
    said = f"{out}\n{err}".strip()
    with contextlib.suppress(ValueError):
        document: Mapping[str, Any] = json.loads(out)
        if complaints := document.get("complaints"):
            return ConfigError(
                "the job is not accepted:\n" + "\n".join(f"  {item['path']} = {item['value']}: {item['remedy']}" for item in complaints)
            )
        if "error" in document:
            return MachineError(str(document["error"]["message"]), str(document["error"]["remedy"]))
    return MachineError(f"`fleetune {' '.join(arguments)}` ended with {code}: {said}")


@contextlib.contextmanager
def _alone(folder: Path) -> Generator[None, None, None]:
    if running(folder):
        raise FolderInUseError(f"a run is under way in {folder}.", "Wait for its end, or end it with Ctrl-C.")
    own = procs.facts(os.getpid())
    write_json(folder / RUNNING_FILE, {"pid": os.getpid(), "start_ticks": own.start_ticks if own is not None else -1})
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            (folder / RUNNING_FILE).unlink()


def _write(out: TextIO, line: record.Record) -> None:
    out.write(record.line(line))
    out.flush()
