"""`fleetune-agent probe` and `doctor`: what this machine can do, measured, and what keeps it from being a good device."""

# Only click and the standard library at import time, as in cli.py.

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fleetune.errors import UnsupportedError

if TYPE_CHECKING:
    from fleetune.agent.config import AgentConfig
    from fleetune.agent.doctor.checks import Finding
    from fleetune.agent.probe.figures import Figures, Key

PROBE_EXAMPLES = (
    "fleetune-agent probe",
    "fleetune-agent probe --base /models/minilm --batch-rows 32 --max-length 128",
    "fleetune-agent probe --base /models/minilm --again --json | jq .answer.model.step_s",
)
DOCTOR_EXAMPLES = ("fleetune-agent doctor", "fleetune-agent doctor --json | jq '.findings[] | select(.level != \"fine\")'")

PROBLEMS_CODE = 6
TOLD_AFTER_S = 2.0
BUSY_RATIO = 1.5
"""Wall time over CPU time per thread from which on figures say more about the neighbours than about the machine."""

_TASKS = {"text-classification": 1, "causal-lm": 2, "seq2seq-lm": 3}
_STAGES = {"matmul": "multiplying matrices", "loading": "loading the model", "measuring": "timing steps", "digests": "reading the base"}


@click.option("--base", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of a base model to measure with.")
@click.option("--task", "model_task", type=click.Choice(list(_TASKS)), default="text-classification", show_default=True, help="What for.")
@click.option("--labels", type=click.IntRange(2, 10_000), default=2, show_default=True, help="Classes of a text classification.")
@click.option("--rank", type=click.IntRange(1, 1024), default=8, show_default=True, help="Rank of the LoRA pairs.")
@click.option("--target", "targets", multiple=True, metavar="NAME", help="LoRA target; several times.  [default: the usual ones]")
@click.option("--batch-rows", type=click.IntRange(1, 4096), default=16, show_default=True, help="Rows in a step.")
@click.option("--max-length", type=click.IntRange(1, 1_000_000), default=128, show_default=True, help="Tokens in a row.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True, help="Of the frozen base."
)
@click.option("--depth", "depths", multiple=True, type=click.IntRange(1), help="Depth to measure, 1 next to the loss; several times.")
@click.option("--only", is_flag=True, help="Train the block at the depth alone, not those above it.")
@click.option("--again", is_flag=True, help="Measure even if there are fresh figures.")
@click.option("--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), help="agent.toml to read, as `run` does.")
@click.option("--state-dir", type=click.Path(file_okay=False, path_type=Path), help="Folder that keeps the figures.")
@click.option("--cores", type=click.IntRange(1, 4096), help="Cores to measure with.  [default: those that training uses]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def probe(
    base: Path | None,
    model_task: str,
    labels: int,
    rank: int,
    targets: Sequence[str],
    batch_rows: int,
    max_length: int,
    dtype: str,
    depths: Sequence[int],
    only: bool,
    again: bool,
    config_file: Path | None,
    state_dir: Path | None,
    cores: int | None,
    as_json: bool,
) -> int:
    """Measure this machine, and with --base how fast and in how much memory it trains that model down to each depth.

    The figures are kept, and measured again when they are old or something they depend on has changed. Takes a minute or two.
    """
    from fleetune.agent.probe import compute, figures, freshness, keys
    from fleetune.v1 import messages_pb2
    from fleetune.wire import basefiles

    config = _config(config_file, state_dir, cores)
    progress = _Progress()
    recipe = messages_pb2.Recipe(
        model_task=messages_pb2.ModelTask.ValueType(_TASKS[model_task]),
        labels=[str(number) for number in range(labels)] if model_task == "text-classification" else [],
        lora=messages_pb2.Lora(rank=rank, alpha=2.0 * rank, targets=targets),
        data=messages_pb2.DataContract(name="probe", max_length=max_length, max_target_length=max_length),
        dtype=dtype,
    )
    recipe_bytes = recipe.SerializeToString(deterministic=True)
    base_digest = ""
    if base is not None:
        base_digest = basefiles.scan(base, lambda _, done, total: progress.at("digests", done, total)).digest
    key = figures.Key(
        base_digest=base_digest,
        recipe_digest=keys.recipe_digest(recipe, depths, only=only) if base is not None else "",
        batch_rows=batch_rows if base is not None else 0,
        torch_version=keys.torch_version(),
        device=keys.device(config.training.accelerator),
        dtype=dtype,
        threads=compute.threads(config.training.cores),
    )
    held = figures.load(config.state_dir, key)
    reason = "measured again on demand" if again else freshness.stale(held.measured_unix_s, time.time(), held.rounds) if held else "new"
    if held is None or reason:
        fields: dict[str, object] = {
            "limits": {"threads": key.threads, "accelerator": config.training.accelerator},
            "batch_rows": batch_rows,
            "depths": sorted(set(depths)) or None,
            "only": only,
        }
        if base is not None:
            fields |= {"base_folder": str(base.resolve()), "recipe": base64.b64encode(recipe_bytes).decode("ascii")}
        held = _measured(key, fields, progress)
        figures.save(config.state_dir, held)
    progress.clear()
    report = _report(held, config)
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report)))
    return 0


@click.option("--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), help="agent.toml to read, as `run` does.")
@click.option("--state-dir", type=click.Path(file_okay=False, path_type=Path), help="Folder whose disk is looked at.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def doctor(config_file: Path | None, state_dir: Path | None, as_json: bool) -> int:
    """Check the board, its system, its clock and its PyTorch, and print the command that mends each problem. Changes nothing."""
    from fleetune.agent.doctor import checks, reading

    config = _config(config_file, state_dir, None)
    progress = _Progress()
    progress.say("importing PyTorch to see whether it works ...")
    found = checks.examine(reading.facts(config.state_dir))
    progress.clear()
    level = checks.worst(found)
    if as_json:
        findings = [{"check": one.check, "level": one.level.value, "message": one.message, "remedy": one.remedy} for one in found]
        click.echo(json.dumps({"level": level.value, "findings": findings}, indent=2))
    else:
        click.echo("\n".join(_finding_lines(found)))
    return PROBLEMS_CODE if level is checks.Level.PROBLEM else 0


class _Progress:
    """What is being done, on standard error, once it takes longer than two seconds: one line that is overwritten on a terminal."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said = ""
        self._terminal = sys.stderr.isatty()

    def at(self, stage: str, done: int, total: int) -> None:
        words = _STAGES.get(stage, stage)
        # Without a terminal a log would fill: one line per stage.
        text = f"{words}: {done} of {total}" if self._terminal and stage != "digests" else f"{words} ..."
        if time.monotonic() - self._began >= TOLD_AFTER_S and text != self._said:
            self.say(text)

    def say(self, text: str) -> None:
        self._said = text
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, err=True, nl=not self._terminal)

    def clear(self) -> None:
        if self._said and self._terminal:
            click.echo("\r\x1b[K", err=True, nl=False)
        self._said = ""


def _measured(key: Key, fields: Mapping[str, object], progress: _Progress) -> Figures:
    from fleetune.agent.probe import energy
    from fleetune.agent.probe.figures import Figures

    before = energy.rapl()
    began = time.monotonic()
    answer = asyncio.run(_ask(fields, key.threads, progress))
    joules = energy.joules(before, energy.rapl())
    answer["seconds"] = time.monotonic() - began
    answer["joules"] = joules
    return Figures(key, "measured", time.time(), answer)


async def _ask(fields: Mapping[str, object], threads: int, progress: _Progress) -> dict[str, object]:
    """The training child's answer. Ctrl-C cancels this, and with it the child."""
    from fleetune.child import threads as child_threads
    from fleetune.child.process import ChildDied, ChildError, ChildProcess

    child = ChildProcess("fleetune.agent.trainer", environment={**child_threads.environment(threads), "HF_HUB_OFFLINE": "1"})

    def on_event(event: Mapping[str, object]) -> None:
        if event.get("event") == "progress":
            progress.at(str(event.get("stage")), int(str(event.get("done"))), int(str(event.get("total"))))

    try:
        return await child.request("measure", fields, on_event)
    except ChildError as error:
        raise UnsupportedError(
            f"Measuring failed: {error}", "Take a smaller --batch-rows or --max-length." if error.kind == "out_of_memory" else ""
        ) from error
    except ChildDied as error:
        raise UnsupportedError(
            f"Measuring failed: {error}.", "Run `fleetune-agent doctor`; if memory is short, lower --batch-rows."
        ) from error
    finally:
        await child.stop()


def _report(held: Figures, config: AgentConfig) -> dict[str, object]:
    """Everything for --json; the table shows the same."""
    from fleetune.agent.probe import energy, thermal
    from fleetune.agent.probe.memory import training_room

    room = training_room(config.training.memory_mib * 1024**2 or None)
    power = energy.power()
    return {
        "source": held.source,
        "measured_unix_s": held.measured_unix_s,
        "age_s": held.age_s(),
        "key": vars(held.key),
        "memory": {"free_bytes": room.free_bytes, "bound_by": room.bound_by},
        "link": link_report(config),
        "power": None if power is None else vars(power),
        "temperature_c": thermal.hottest_c(),
        "rounds": {"ratio": held.rounds.average, "margin": held.rounds.margin, "count": len(held.rounds.ratios)},
        "answer": dict(held.answer),
    }


def link_report(config: AgentConfig) -> dict[str, object] | None:
    """What the running agent has learned of its link, under the owner's word for it; None where nobody knows anything."""
    from fleetune.agent.probe import figures, linkfigures

    stored = linkfigures.stored(config.state_dir / figures.FOLDER)
    told = {"up": config.link.up_mbps * 1e6, "down": config.link.down_mbps * 1e6}
    if stored is None and not any(told.values()) and not config.link.metered:
        return None
    now = time.time()
    learned = {
        "up": (stored.up_bits_per_s, stored.up_unix_s) if stored else (0.0, 0.0),
        "down": (stored.down_bits_per_s, stored.down_unix_s) if stored else (0.0, 0.0),
    }
    found: dict[str, object] = {
        "coordinator": stored.coordinator if stored else config.coordinator,
        "round_trip_s": stored.round_trip_s if stored and stored.round_trip_s else None,
        "metered": config.link.metered,
    }
    for way, (bits_per_s, unix_s) in learned.items():
        source = "configured" if told[way] else "measured" if bits_per_s else "none"
        age_s = max(0.0, now - unix_s) if source == "measured" else None
        found[way] = {"bits_per_s": told[way] or bits_per_s or None, "source": source, "age_s": age_s}
    return found


def link_words(link: Mapping[str, object]) -> str:
    words: list[str] = []
    for way in ("up", "down"):
        figure = _table(link[way])
        if figure["bits_per_s"] is None:
            words.append(f"{way} not known")
            continue
        age = f", {_age(_number(figure['age_s']))} old" if figure["age_s"] is not None else ""
        words.append(f"{way} {_number(figure['bits_per_s']) / 1e6:.1f} Mbit/s ({figure['source']}{age})")
    if link["round_trip_s"] is not None:
        words.append(f"round trip {1e3 * _number(link['round_trip_s']):.0f} ms")
    return ", ".join([*words, *(["metered"] if link["metered"] else [])])


def _lines(report: Mapping[str, object]) -> list[str]:
    answer, memory = _table(report["answer"]), _table(report["memory"])
    machine, model = _table(answer["machine"]), _table(answer.get("model") or {})
    power = report["power"]
    rows = [
        ("source", f"{report['source']}, {_age(_number(report['age_s']))} old"),
        ("device", f"{_table(report['key'])['device']}, {machine['threads']} threads"),
        ("torch", f"{machine['torch_version']}, {machine['dtype']} on {machine['accelerator']}"),
        ("matmul peak", f"{_number(machine['peak_flops_per_s']) / 1e9:.1f} GFLOP/s"),
        ("free for training", f"{_mib(memory['free_bytes'])} (bound: {memory['bound_by']})"),
        ("link", "not known: no agent has run here" if report["link"] is None else link_words(_table(report["link"]))),
        ("power", "none" if power is None else f"{_number(_table(power)['watts']):.1f} W ({_table(power)['scope']})"),
        ("temperature", "none" if report["temperature_c"] is None else f"{_number(report['temperature_c']):.0f} °C"),
    ]
    if "gpu_memory_free_bytes" in machine:
        rows.append(("GPU memory", f"{_mib(machine['gpu_memory_free_bytes'])} free of {_mib(machine['gpu_memory_total_bytes'])}"))
    if model:
        rows += [
            ("batch", f"{model['batch_rows']} rows of {model['tokens_per_row']} tokens"),
            ("speed", f"{_number(model['tokens_per_s']):.0f} tokens/s trained down to the last depth measured"),
            ("achieved", f"{_number(model['flops_per_s']) / 1e9:.2f} GFLOP/s, {100 * _number(answer['mfu']):.0f} % of the matmul peak"),
            ("model in memory", f"{_mib(model['loaded_bytes'])} with PyTorch, before a step"),
            ("forward alone", f"{1e3 * _number(model['forward_s']):.1f} ms"),
        ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    return [*lines, "", *_depth_lines(model, int(_number(machine["threads"])), machine["accelerator"] == "cpu")] if model else lines


def _depth_lines(model: Mapping[str, object], threads: int, on_cpu: bool) -> list[str]:
    """One line per depth; a star marks the measured ones, the others lie on the line between."""
    blocks = cast("list[dict[str, object]]", model["blocks"])
    measured = {int(_number(point["depth"])) for point in cast("list[dict[str, object]]", model["points"])}
    columns = [cast("list[float]", model[name]) for name in ("step_s", "step_bytes", "saved_bytes")]
    lines = [f"{'depth':>5}  {'block':<16} {'step':>10} {'step memory':>12} {'activations':>12} {'parameters':>11}"]
    for number, (block, step_s, step_bytes, saved) in enumerate(zip(blocks, *columns, strict=True), 1):
        lines.append(
            f"{number:>4}{'*' if number in measured else ' '}  {block['name']!s:<16} {1e3 * step_s:>7.1f} ms "
            f"{_mib(step_bytes):>12} {_mib(saved):>12} {block['parameters']:>11,}"
        )
    points = cast("list[dict[str, object]]", model["points"])
    busiest = max(_number(point["step_s"]) * threads / max(1e-9, _number(point["cpu_s"])) for point in points) if on_cpu else 0.0
    if busiest > BUSY_RATIO:
        lines.append(f"warning: steps took up to {busiest:.1f} times their CPU time: other programs use this machine; probe --again later.")
    return [
        *lines,
        f"* measured; the rest lies between. Step memory is above the loaded model, {model['step_bytes_source']}, with a margin.",
    ]


def _finding_lines(found: Sequence[Finding]) -> list[str]:
    width = max(len(one.check) for one in found)
    lines: list[str] = []
    for one in found:
        lines.append(f"{one.level.value:<7}  {one.check:<{width}}  {one.message}")
        if one.remedy:
            lines.append(f"{'':7}  {'':<{width}}  -> {one.remedy}")
    return lines


def _config(config_file: Path | None, state_dir: Path | None, cores: int | None) -> AgentConfig:
    from fleetune.agent import config

    named = {"state_dir": state_dir, "training.cores": cores}
    overrides: dict[str, object] = {path: str(value) for path, value in named.items() if value is not None}
    return config.load(config_file or config.find_file(os.environ, Path.home()), os.environ, overrides)


def _table(value: object) -> dict[str, object]:
    return cast("dict[str, object]", value)


def _number(value: object) -> float:
    return float(cast("float", value))


def _mib(value: object) -> str:
    return f"{_number(value) / 2**20:,.1f} MiB"


def _age(seconds: float) -> str:
    for unit_s, name in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.0f} s"
