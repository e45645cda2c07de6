"""`fleetune demo`: a coordinator and agents on this machine fine-tune a small model, from nothing to a loaded adapter."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from fleetune.coordinator import config, initialise, jobspec, watch
from fleetune.coordinator import operator as operators
from fleetune.coordinator.client import Client, Exported
from fleetune.coordinator.demo.crew import Crew, Member, died
from fleetune.coordinator.demo.material import AGENTS, ROUNDS, DemoSettings, Material, cores_for_each, prepare, write_agent_config
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.figures import bytes_text, count_text, duration_text, loss_text, metric_text
from fleetune.coordinator.fleet_client import FleetClient
from fleetune.coordinator.jsonview import Json, message_json
from fleetune.coordinator.report import device_shares
from fleetune.coordinator.rounds import adapter
from fleetune.v1 import control_pb2 as pb
from fleetune.v1 import registry_pb2
from fleetune.wire import identity
from fleetune.wire.identity import Identity
from fleetune.wire.joinline import JoinLine

__all__ = ["AGENTS", "ROUNDS", "DemoSettings", "main"]

READY_S = 60.0
"""A coordinator on a busy machine starts within a few seconds; after this it hangs."""

POLL_S = 0.05

TOKEN_S = 600.0
"""Far longer than the agents take to join."""


@dataclass(frozen=True)
class Ended:
    """How the demo's job ended. `adapter` is None where no round was committed."""

    job: pb.JobView
    adapter: Exported | None
    seconds: float
    """From the start of the first process to the adapter on disk."""
    sent_bytes: Mapping[str, int]
    """Size of each agent's update in the last round."""


def main(settings: DemoSettings, console: Console, *, lines: bool, as_json: bool) -> int:
    """Runs the demo and returns its exit code. SIGINT, SIGTERM and SIGHUP end every process in order."""
    material = prepare(settings, Path.cwd() / "fleetune-demo" / time.strftime("%Y%m%d-%H%M%S"))
    if as_json:
        # The summary is the one document on stdout; progress goes where it does not mix with it.
        console = Console(file=sys.stderr, highlight=False, no_color=console.no_color)
    return asyncio.run(_run(material, settings, console, lines=lines, as_json=as_json))


async def _run(material: Material, settings: DemoSettings, console: Console, *, lines: bool, as_json: bool) -> int:
    crew = Crew()
    received: list[signal.Signals] = []
    work = asyncio.ensure_future(_work(material, settings, crew, console, lines=lines))

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            work.cancel()
        else:
            # Asked twice: a person who does not want to wait.
            crew.kill()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    try:
        try:
            ended = await work
        except asyncio.CancelledError:
            if not received:
                raise
            console.print(f"\nstopping; all that was written is in {material.folder}", style="yellow", soft_wrap=True)
            return ExitCode.INTERRUPTED if received[0] is signal.SIGINT else ExitCode.TERMINATED
        finally:
            await crew.stop()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
    if as_json:
        sys.stdout.write(json.dumps(_summary_json(material, ended), indent=2, ensure_ascii=False) + "\n")
    else:
        console.print(summary(material, ended))
        if ended.job.state == pb.JOB_STATE_COMPLETED and ended.adapter is not None:
            # Soft wrap leaves it to the terminal to break lines, so that what is copied is what was written.
            for line in ["", " load it:", "", *loading_lines(material), ""]:
                console.print(Text(line, style="cyan" if "=" in line or "import" in line else "dim"), soft_wrap=True)
            for line in [" look at its rounds again:", "", *looking_lines(material), ""]:
                console.print(Text(line, style="cyan" if "fleetune" in line else "dim"), soft_wrap=True)
    if ended.job.state == pb.JOB_STATE_COMPLETED:
        return ExitCode.OK
    return ExitCode.JOB_CANCELLED if ended.job.state == pb.JOB_STATE_CANCELLED else ExitCode.JOB_FAILED


async def _work(material: Material, settings: DemoSettings, crew: Crew, console: Console, *, lines: bool) -> Ended:
    started = time.monotonic()
    console.print(_opening(material, settings), soft_wrap=True)
    state = material.coordinator_state
    operator = await asyncio.to_thread(_initialised, state, material.identity)
    coordinator = await crew.start(
        "coordinator",
        "fleetune.coordinator.cli",
        ["serve", "--listen", "127.0.0.1:0", "--join-listen", "127.0.0.1:0", "--state-dir", str(state)],
        material.log("coordinator"),
    )
    address = await _address(coordinator, state / "address")
    # For whoever looks at the demo with --identity: only now is the port known.
    operator = replace(operator, facts=replace(operator.facts, coordinator=address))
    await asyncio.to_thread(identity.store, material.identity, operator)
    line = await _join_line(address, operator, len(material.agents))
    cores = cores_for_each(settings.agents)
    for agent in material.agents:
        write_agent_config(agent.config, name=agent.name, coordinator=address, base=material.base, cores=cores, up_mbps=agent.up_mbps)
    await asyncio.gather(*(_join(crew, material, agent.name, agent.config, line) for agent in material.agents))
    for agent in material.agents:
        await crew.start(agent.name, "fleetune.agent.cli", ["run", "--config", str(agent.config)], material.log(agent.name))
    async with Client(address, operator) as client:
        death = asyncio.ensure_future(crew.death())
        following = asyncio.ensure_future(_follow(client, material, console, lines=lines))
        try:
            done, _ = await asyncio.wait({death, following}, return_when=asyncio.FIRST_COMPLETED)
            if following not in done:
                raise death.result()
            job, exported = following.result()
        finally:
            for task in (death, following):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
    sent_bytes = _sent_bytes(exported.folder / adapter.MANIFEST_FILE) if exported is not None else {}
    return Ended(job, exported, time.monotonic() - started, sent_bytes)


def _initialised(state_dir: Path, folder: Path) -> Identity:
    """What `fleetune init` does; the operator may do everything."""
    settings = config.load(None, {}, {"state_dir": str(state_dir), "listen": "127.0.0.1:0"})
    initialise.initialise(settings, "demo", folder, "")
    return operators.load(folder)


async def _join_line(address: str, operator: Identity, uses: int) -> JoinLine:
    """What `fleetune token create` prints."""
    request = registry_pb2.CreateTokenRequest(kind=registry_pb2.IDENTITY_KIND_AGENT, uses=uses, ttl_s=TOKEN_S)
    async with FleetClient(address, operator) as client:
        answer = await client.create_token(request)
    return JoinLine(address, answer.join_port, bytes.fromhex(answer.root_fingerprint), answer.token)


async def _join(crew: Crew, material: Material, name: str, config_file: Path, line: JoinLine) -> None:
    """`fleetune-agent join`, the line on its standard input."""
    await crew.run(
        f"{name} (join)", "fleetune.agent.cli", ["join", "--config", str(config_file), "-"], material.log(name), f"{line.text()}\n"
    )


async def _follow(client: Client, material: Material, console: Console, *, lines: bool) -> tuple[pb.JobView, Exported | None]:
    job_id = await client.submit(material.job_toml)
    notice = watch.Notice()
    job = await watch.show(client.watch(job_id, notice.set), console, notice, lines=lines)
    exported = await client.export(job_id, material.adapter) if job.rounds_committed else None
    return job, exported


async def _address(coordinator: Member, file: Path) -> str:
    """Where the coordinator listens, as soon as it has said so."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if coordinator.process.returncode is not None:
            raise died(coordinator)
        address = _read(file)
        if address:
            return address
        await asyncio.sleep(POLL_S)
    raise MachineError(f"the coordinator was not ready within {READY_S:.0f} s.", f"Its log is {coordinator.log}.")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _opening(material: Material, settings: DemoSettings) -> RenderableType:
    rows = sum(agent.rows for agent in material.agents)
    dealt = "evenly" if settings.split == "iid" else f"by Dirichlet({settings.alpha:g})"
    text = Text()
    text.append(" fleetune demo\n", style="bold")
    text.append(f" {rows:,} rows of {len(material.labels)} classes, dealt {dealt}: ")
    text.append(", ".join(f"{agent.name} {agent.rows}" for agent in material.agents) + "\n")
    text.append(f" one coordinator and {count_text(len(material.agents), 'agent')} as processes of their own; files and logs in\n")
    text.append(f" {material.folder}\n", style="cyan")
    return text


def loading_lines(material: Material) -> list[str]:
    """Three lines of Python that give the fine-tuned model."""
    return adapter.loading_lines(jobspec.parse(material.job_toml), str(material.base), str(material.adapter))


def looking_lines(material: Material) -> list[str]:
    """How to ask the demo's coordinator again, which has ended: start it, then ask as the demo's operator."""
    return [
        f"fleetune serve --state-dir {shlex.quote(str(material.coordinator_state))}   # in another terminal",
        f"fleetune report last --coordinator 127.0.0.1:7433 --identity {shlex.quote(str(material.identity))}",
    ]


def summary(material: Material, ended: Ended) -> RenderableType:
    """What a person takes away; pure."""
    job = ended.job
    if ended.adapter is None or job.state != pb.JOB_STATE_COMPLETED:
        text = Text.assemble(("\nthe demo's job ", ""), (watch.state_word(job.state), f"bold {watch.state_style(job.state)}"))
        return Group(text, Text(job.message or "no reason was given"), Text(f"logs: {material.folder / 'logs'}", style="dim"))
    before, after = _accuracies(job)
    grid = Table.grid(Column(style="dim", no_wrap=True), Column(no_wrap=True, overflow="ignore"), padding=(0, 3, 0, 0))
    measured = Text.assemble((metric_text("accuracy", before), ""), " before, ", (metric_text("accuracy", after), "bold green"), " after")
    grid.add_row("accuracy", measured.append(f" {count_text(job.rounds_committed, 'round')}, on {material.test_rows} held-out rows"))
    grid.add_row("time", f"{duration_text(ended.seconds)} in all, {duration_text(_round_s(job))} a round")
    grid.add_row("bytes", f"up {bytes_text(job.upload_bytes)}, down {bytes_text(job.download_bytes)}; no row left its agent")
    grid.add_row("adapter", f"{ended.adapter.folder}")
    return Padding(Group(Text(), _devices(material, ended), Text(), grid), (0, 0, 0, 1))


def _devices(material: Material, ended: Ended) -> RenderableType:
    job = ended.job
    shares = {share.device: share for share in device_shares(job)}
    heads = ("rows", "classes", "rounds", "trained", "share", "train loss", "sent a round")
    table = Table(
        Column("agent", no_wrap=True),
        *(Column(head, justify="right", no_wrap=True) for head in heads),
        box=None,
        header_style="dim",
        pad_edge=False,
        padding=(0, 3, 0, 0),
    )
    for agent in material.agents:
        share = shares.get(agent.name)
        cells = ["-"] * 5
        if share is not None:
            loss = loss_text(_last_loss(job, agent.name))
            sent = bytes_text(ended.sent_bytes[agent.name]) if agent.name in ended.sent_bytes else "-"
            cells = [f"{share.rounds_done}/{job.rounds_committed}", f"{share.samples:,}", f"{share.share:.1%}", loss, sent]
        table.add_row(agent.name, f"{agent.rows:,}", f"{agent.labels}/{len(material.labels)}", *cells)
    return table


def _sent_bytes(manifest: Path) -> dict[str, int]:
    """From the manifest beside the adapter."""
    document = json.loads(manifest.read_text(encoding="utf-8"))
    return {str(device["name"]): int(device["bytes"]) for device in document["devices"]}


def _last_loss(job: pb.JobView, device: str) -> float | None:
    losses = [task.loss for item in job.history for task in item.tasks if task.device_name == device and task.HasField("loss")]
    return losses[-1] if losses else None


def _accuracies(job: pb.JobView) -> tuple[float | None, float | None]:
    after = watch.metric_of(job.history[-1].metrics, "accuracy") if job.history else None
    return watch.metric_of(job.initial_metrics, "accuracy"), after


def _round_s(job: pb.JobView) -> float:
    seconds = sorted(item.ended_unix_s - item.started_unix_s for item in job.history)
    return seconds[len(seconds) // 2] if seconds else 0.0


def _summary_json(material: Material, ended: Ended) -> dict[str, Json]:
    before, after = _accuracies(ended.job)
    return {
        "state": watch.state_word(ended.job.state),
        "accuracy_before": before,
        "accuracy_after": after,
        "seconds": round(ended.seconds, 3),
        "folder": str(material.folder),
        "base": str(material.base),
        "adapter": str(ended.adapter.folder) if ended.adapter is not None else None,
        "load": list(loading_lines(material)),
        "agents": [
            {"name": agent.name, "rows": agent.rows, "validation_rows": agent.validation_rows, "labels": agent.labels}
            for agent in material.agents
        ],
        "job": message_json(ended.job),
    }
