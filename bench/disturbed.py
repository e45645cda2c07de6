"""A job on four devices that are hit by random faults, beside the same job left alone: what its model has lost by them.

    sudo .venv/bin/python bench/disturbed.py [--backend netns] [--seconds 300] [--every 10] [--seed 3] [--out FOLDER] [--write]

Both are whole testbeds: started, trained on, ended, their history checked. Job, rows, seeds and devices are the same. The faults are
kills, pauses, cut links and out-of-memories at random times, of random devices; beside them the coordinator is killed now and then. A
fault every 10 s on average for 5 minutes leaves no round as it was planned; the loss on held-out rows has to come out within 2 % all the
same. A testbed whose report is in --out already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import report
import sections

WITHIN = 0.02
"""Of the undisturbed run's loss."""

PAGE = Path(__file__).resolve().parents[1] / "docs" / "testbed-report.md"
KINDS: Mapping[str, str] = {"kill": "for_s = 5.0", "pause": "for_s = 10.0", "cut": "for_s = 10.0", "out_of_memory": ""}
COORDINATOR_EVERY = 12
"""Of so many faults one more is a kill of the coordinator."""

TESTBED = """\
name = "disturbed"
seed = {seed}

[[device]]
kind = "pi4"
count = 2

[[device]]
kind = "pi5"
count = 2
"""


@dataclass(frozen=True)
class Told:
    """One testbed's run, from its record and its report."""

    loss: float
    accuracy: float
    before: float
    """The loss before the first round."""
    seconds: float
    faults_s: float
    """When the last fault was made, from the first round's begin."""
    back_s: float | None
    """From a fault until its member worked again, median."""
    curve: tuple[tuple[int, float], ...]
    """Round and loss on the held-out rows."""
    robust: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        return int(self.robust["rounds_committed"])

    @property
    def sound(self) -> bool:
        """False also where the history was not checked."""
        return self.robust["violations"] is not None and not self.robust["violations"]


def main() -> int:
    """1 where the loss is off by more than 2 %, or a history is not sound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", choices=("netns", "compose", "process"), default="netns", help="process has no cut and no out of memory"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="of faults, from the first round's begin")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two faults, on average")
    parser.add_argument("--rounds", type=int, default=40, help="enough that training outlasts the faults")
    parser.add_argument("--deadline-s", type=float, default=120.0, help="of a round: whoever is not back by then is not waited for")
    parser.add_argument("--seed", type=int, default=3, help="of job, rows and faults")
    parser.add_argument("--out", type=Path, help="keeps records and reports here, and goes on with what is there")
    parser.add_argument("--write", action="store_true", help="put the table into docs/testbed-report.md")
    options = parser.parse_args()
    command = f"python {' '.join('FOLDER' if before == '--out' else word for before, word in zip(['', *sys.argv], sys.argv, strict=False))}"
    print(f"{report.machine()}\ncommand: {command}", flush=True)
    with tempfile.TemporaryDirectory(prefix="disturbed-") as scratch:
        out = Path(scratch) if options.out is None else options.out.absolute()
        out.mkdir(parents=True, exist_ok=True)
        alone = _run(out / "undisturbed", options, None)
        hit = _run(out / "disturbed", options, chaos(options))
    text = table(alone, hit, options)
    print(text)
    if options.write:
        sections.put("disturbed", f"{text}\n\n{sections.measured(command)}", PAGE)
    return int(abs(hit.loss / alone.loss - 1) > WITHIN or not (alone.sound and hit.sound))


def chaos(options: argparse.Namespace) -> str:
    """A chaos.toml: each kind as often as the others, of any device."""
    kinds = {kind: words for kind, words in KINDS.items() if options.backend != "process" or kind in ("kill", "pause")}
    lines = [f"seed = {options.seed}"]
    faults = [(kind, "any", options.every * len(kinds), words) for kind, words in kinds.items()]
    faults.append(("kill", "coordinator", options.every * COORDINATOR_EVERY, "for_s = 5.0"))
    for kind, target, every_s, words in faults:
        lines += [
            "",
            "[[fault]]",
            f'kind = "{kind}"',
            f'target = "{target}"',
            f"every_s = {every_s:.1f}",
            f"until_s = {options.seconds:.1f}",
        ]
        lines += [words] if words else []
    return "\n".join(lines) + "\n"


def _run(folder: Path, options: argparse.Namespace, chaos_toml: str | None) -> Told:
    """Up, a job to its end, down; or what an earlier call has left."""
    if not _whole(folder):
        settings = folder.with_suffix(".toml")
        settings.write_text(TESTBED.format(seed=options.seed), encoding="utf-8")
        faults: list[str] = []
        if chaos_toml is not None:
            faults = ["--chaos", str(folder.with_suffix(".chaos.toml"))]
            Path(faults[1]).write_text(chaos_toml, encoding="utf-8")
        sets = [f"rounds.count={options.rounds}", f"rounds.deadline_s={options.deadline_s:g}"]
        sets += ['training.schedule="cosine"', "evaluation.every=5", 'evaluation.metric="loss"']
        try:
            _verb(folder, "up", "--file", str(settings), "--backend", options.backend)
            # The base comes to the devices over their links, which takes several rounds' time: not under a round's deadline.
            _verb(folder, "run", "--plain", "--no-report", "--set", "rounds.count=1")
            _verb(folder, "run", "--plain", *faults, *(word for setting in sets for word in ("--set", setting)))
        finally:
            _verb(folder, "down")
    found = told(folder)
    print(
        f"{folder.name}: loss {found.loss:.4f}, accuracy {found.accuracy:.3f}, {found.rounds} rounds in {found.seconds:.0f} s", flush=True
    )
    return found


def _whole(folder: Path) -> bool:
    """Whether a completed run and its checked history are there."""
    made = folder / "report.json"
    if not made.exists():
        return False
    figures = _document(made)
    return figures["status"] == "completed" and figures["robustness"]["violations"] is not None


def told(folder: Path) -> Told:
    """What record and report of a testbed's folder say."""
    lines = [cast("Mapping[str, Any]", json.loads(text)) for text in (folder / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    made = [line["at_unix_s"] for line in lines if line["what"] == "acted" and line["act"] in KINDS]
    job = next(line for line in lines if line["what"] == "ended")["report"]
    history = job["history"]
    robust = _document(folder / "report.json")["robustness"]
    curve = tuple((int(item["round"]), float(item["metrics"]["loss"])) for item in history if "loss" in item["metrics"])
    accuracy = next(float(item["metrics"]["accuracy"]) for item in reversed(history) if "accuracy" in item["metrics"])
    begun = history[0]["started_unix_s"]
    return Told(
        loss=curve[-1][1],
        accuracy=accuracy,
        before=float(job["initial_metrics"]["loss"]),
        seconds=history[-1]["ended_unix_s"] - begun,
        faults_s=max(made) - begun if made else 0.0,
        back_s=robust["back_median_s"],
        curve=curve,
        robust=robust,
    )


def table(alone: Told, hit: Told, options: argparse.Namespace) -> str:
    """The section for docs/testbed-report.md."""
    kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in hit.robust["faults_made"].items())
    off = 100 * (hit.loss / alone.loss - 1)
    lines = [
        "## What faults cost a job",
        "",
        f"The shipped rows dealt evenly to two pi4 and two pi5 ({options.backend}), MiniLM, {options.rounds} rounds of at most "
        f"{options.deadline_s:g} s with a rate that falls to zero, twice with the same seeds: left alone, and with a fault every "
        f"{options.every:g} s on average in the first {options.seconds:g} s (seed {options.seed}; the coordinator is killed as well). "
        "Loss and accuracy are those of held-out rows.",
        "",
        "| | left alone | disturbed |",
        "| --- | --- | --- |",
        f"| loss at the end (before: {alone.before:.3f}) | {alone.loss:.4f} | {hit.loss:.4f} ({off:+.1f} %; at most 2 % is to be) |",
        f"| accuracy at the end | {alone.accuracy:.3f} | {hit.accuracy:.3f} |",
        f"| rounds, seconds | {alone.rounds}, {alone.seconds:.0f} | {hit.rounds}, {hit.seconds:.0f} |",
        f"| rounds with all devices that were asked | {alone.robust['rounds_whole']} | {hit.robust['rounds_whole']} |",
        f"| tasks done, failed by name, lost | {_tasks(alone)} | {_tasks(hit)} |",
        f"| faults | none | {sum(hit.robust['faults_made'].values())}: {kinds}; the last after {hit.faults_s:.0f} s |",
        f"| from a fault until its member worked again, median | - | {'-' if hit.back_s is None else f'{hit.back_s:.0f} s'} |",
        f"| history checker | {_checked(alone)} | {_checked(hit)} |",
        "",
        "Loss by rounds, left alone and disturbed: "
        + ", ".join(f"{round_}: {loss:.3f} {other:.3f}" for (round_, loss), (_, other) in zip(alone.curve, hit.curve, strict=False))
        + ".",
    ]
    return "\n".join(lines)


def _tasks(one: Told) -> str:
    return f"{one.robust['tasks_done']}, {one.robust['tasks_failed']}, {one.robust['tasks_lost']}"


def _checked(one: Told) -> str:
    return "sound" if one.sound else f"violations: {one.robust['violations']}"


def _verb(folder: Path, *arguments: str) -> None:
    print(f"fleetune testbed {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "fleetune.coordinator.cli", "testbed", *arguments, "--folder", str(folder)], check=True)


def _document(file: Path) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
