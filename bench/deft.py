"""DEFT on real processes: round latency by solver on unequal devices, and what each layout learns in the same time.

    .venv/bin/python bench/deft.py latency [--fleets 3] [--write]       # root: namespaces, shaped links, quotas
    .venv/bin/python bench/deft.py learning --data FOLDER [--alphas 0 0.5] [--seeds 3] [--out FOLDER] [--within-s 1200] [--write]

latency: 8 devices whose quotas of processor time (at most 1.5 cores together) and solo link rates are 4 times apart train a decoder of
6 layers, whose own weights are the payload. Airtime is the shared resource, and shares are hard caps for every solver.
learning: 8 devices fine-tune MiniLM on TREC-6; accuracy by rows and by the devices' processor seconds, which a busy machine does not
stretch as it does those of the clock, for DEFT, depth-aware data parallelism and federated LoRA. Of several seeds, each of which seeds the
split, the adapter and the order of rows, the median counts. What was measured lies in --out by split, seed and method: a call does what is
not there yet, as far as it gets --within-s, and tells all that is there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Before grpc is imported: its own log lines would stand between ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import plot
import report
import sections
import trec6
from fleet import Fleet
from minilm import minilm_folder
from netfleet import Board, NetFleet

from fleetune.coordinator import watch
from fleetune.coordinator.client import Client
from fleetune.coordinator.demo import split
from fleetune.v1 import control_pb2

DEVICES = 8
LAYERS = 6
CORES = 1.4
"""All quotas together."""
SPREAD = 4.0
"""Fastest by slowest, in computing and again in link rate."""
UP_BITS_PER_S = 32e6
"""Solo rate in the geometric middle."""
DOWN_BITS_PER_S = 200e6
HIDDEN, INNER, HEADS = 192, 512, 6
WORDS = 400
TOKENS, ROWS = 64, 10
WARMUP_ROUNDS = 3
TARGET = 0.85
"""Accuracy whose time is told."""
_DOCS = Path(__file__).resolve().parents[1] / "docs"

SOLVERS: Mapping[str, Sequence[str]] = {
    "exact": ("method.solver=exact",),
    "crunch-equal": ("method.solver=crunch-equal",),
    "greedy-equal": ("method.solver=greedy-equal",),
    "random-equal": ("method.solver=random-equal",),
    "best single device": ("method.layout=single",),
}


@dataclass(frozen=True)
class Timed:
    """One round of one job: seconds from the start of training to the last update, predicted and real."""

    predicted_s: float
    actual_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    latency = parts.add_parser("latency")
    latency.add_argument("--fleets", type=int, default=3)
    latency.add_argument("--first-seed", type=int, default=1)
    latency.add_argument("--rounds", type=int, default=8, help=f"of each job; the first {WARMUP_ROUNDS} do not count")
    latency.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    latency.add_argument("--keep", type=Path, help="folder for logs and reports, instead of one that is removed")
    latency.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    learning = parts.add_parser("learning")
    learning.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="train.jsonl, test.jsonl and labels.json, as bench/trec6.py"
    )
    learning.add_argument("--rows", type=int, default=6144, help="passed forward by each method")
    learning.add_argument("--points", type=int, default=6, help="of each curve")
    learning.add_argument("--learning-rate", type=float, default=2e-3)
    learning.add_argument("--alphas", type=float, nargs="+", default=[0.0], help="of Dirichlet splits; 0 deals the rows evenly")
    learning.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ...")
    learning.add_argument("--first-seed", type=int, default=0)
    learning.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    learning.add_argument("--out", type=Path, help="folder of what was measured, to go on with at the next call")
    learning.add_argument("--within-s", type=float, default=math.inf, help="begin nothing that would be likely to end after so long")
    learning.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    options = parser.parse_args()
    print(f"{report.machine()}\ncommand: {_command()}", flush=True)
    return _latency(options) if options.part == "latency" else _learning(options)


# ----------------------------------------------------------------------------------------------------------------- latency


def _latency(options: argparse.Namespace) -> int:
    found: dict[int, dict[str, list[Timed]]] = {}
    for seed in range(options.first_seed, options.first_seed + options.fleets):
        with tempfile.TemporaryDirectory(prefix="deft-") as scratch:
            folder = (options.keep / f"fleet-{seed}").resolve() if options.keep is not None else Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            found[seed] = _fleet(folder, seed, options)
    text = _latency_table(found)
    print(text)
    if options.write:
        sections.put("deft-latency", f"{text}\n\n{sections.measured(_command())}")
    return 0


def boards(seed: int, folder: Path) -> list[Board]:
    """Quotas and rates are log-uniform and independent; both have their full spread."""
    chance = random.Random(seed)

    def spread(middle: float) -> list[float]:
        steps = [index / (DEVICES - 1) - 0.5 for index in range(DEVICES)]
        chance.shuffle(steps)
        return [middle * SPREAD**step for step in steps]

    quotas, rates = spread(1.0), spread(UP_BITS_PER_S)
    scale = CORES / sum(quotas)
    rows = folder / "rows.jsonl"
    settings = f'[data.words]\ntrain = "{rows}"\n[training]\ncores = 1\n'
    return [
        Board(f"d{number}", quota * scale, rate, DOWN_BITS_PER_S, settings=settings)
        for number, (quota, rate) in enumerate(zip(quotas, rates, strict=True))
    ]


def _fleet(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, list[Timed]]:
    base = _base(folder / "base")
    fleet_boards = boards(seed, folder)
    chance = random.Random(0)
    lines = [json.dumps({"text": " ".join(f"w{chance.randrange(WORDS)}" for _ in range(2 * TOKENS))}) for _ in range(256)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    job = folder / "job.toml"
    job.write_text(_job(base, options.rounds), encoding="utf-8")
    print(
        f"\nfleet {seed}: " + ", ".join(f"{b.name} {b.cpus:.2f} cores {b.up_bits_per_s / 1e6:.0f} Mbit/s" for b in fleet_boards), flush=True
    )
    timed: dict[str, list[Timed]] = {}
    with NetFleet(folder, fleet_boards) as fleet:
        for name in options.solvers:
            sets = [word for setting in (*SOLVERS[name], f"seed={seed}") for word in ("--set", setting)]
            fleet.verb("submit", "--wait", "--plain", *sets, str(job))
            made = fleet.verb("report", "last", "--json")
            (folder / f"{name.replace(' ', '-')}.json").write_text(made, encoding="utf-8")
            timed[name] = _timed(json.loads(made))[WARMUP_ROUNDS:]
            print(f"  {name:<20} {_words(timed[name])}", flush=True)
    return timed


def _words(rounds: Sequence[Timed]) -> str:
    actual = statistics.median(r.actual_s for r in rounds)
    predicted = statistics.median(r.predicted_s for r in rounds)
    return f"{actual:6.2f} s a round, {predicted:6.2f} s predicted ({100 * (actual / predicted - 1):+.0f} %)"


def _base(folder: Path) -> Path:
    """A decoder of 6 layers with random weights, and a tokenizer of whole words."""
    # Any: their stubs leave much untyped.
    torch: Any = importlib.import_module("torch")
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *(f"w{n}" for n in range(WORDS))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * TOKENS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    fast.save_pretrained(folder)
    return folder


def _job(base: Path, rounds: int) -> str:
    return f"""
name = "latency"
[model]
base = "{base}"
[task]
kind = "causal-lm"
[data]
name = "words"
text = "text"
max_length = {TOKENS}
[training]
batch_size = {ROWS}
learning_rate = 1e-4
[method]
name = "deft"
trains = "full"
resource = "airtime"
sharing = "hard"
deadline_factor = 0
[rounds]
count = {rounds}
[devices]
minimum = {DEVICES}
[evaluation]
source = "none"
"""


def _timed(told: Mapping[str, Any]) -> list[Timed]:
    """Of each committed round of a job's report."""
    plans = [round_["plan"] for round_ in told["history"]]
    return [Timed(float(plan["predicted_s"]), float(plan["actual_s"])) for plan in plans]


def _latency_table(found: Mapping[int, Mapping[str, Sequence[Timed]]]) -> str:
    names = list(next(iter(found.values())))
    lines = [
        "## DEFT: rounds on real processes",
        "",
        f"{DEVICES} devices in network namespaces, quotas {SPREAD:g} times apart that sum to {CORES:g} cores, solo rates {SPREAD:g} times "
        f"apart around {UP_BITS_PER_S / 1e6:g} Mbit/s, airtime shared, hard caps; {LAYERS} blocks of a decoder's own weights; median round "
        f"after {WARMUP_ROUNDS} warm-up rounds, seconds real (predicted).",
        "",
        "| solver | " + " | ".join(f"fleet {seed}" for seed in found) + " | real against exact | predicted off by |",
        "| --- |" + " --- |" * (len(found) + 2),
    ]
    for name in names:
        cells: list[str] = []
        ratios: list[float] = []
        off: list[float] = []
        for timed in found.values():
            actual = statistics.median(r.actual_s for r in timed[name])
            cells.append(f"{actual:.2f} ({statistics.median(r.predicted_s for r in timed[name]):.2f})")
            ratios.append(actual / statistics.median(r.actual_s for r in timed[names[0]]))
            off += [abs(r.actual_s / r.predicted_s - 1) for r in timed[name] if r.predicted_s > 0]
        cells += [f"{math.exp(statistics.mean(math.log(r) for r in ratios)):.2f}", f"{100 * statistics.median(off):.0f} %"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- learning

LEARNERS: Mapping[str, str] = {
    "federated LoRA": '[method]\nname = "fedavg_lora"\n',
    "depth-aware data parallelism": '[method]\nname = "deft"\nlayout = "depth"\npayload = "deltas"\n',
    "DEFT, deltas": '[method]\nname = "deft"\npayload = "deltas"\nrotate_rounds = 2\n',
    "DEFT, gradients": '[method]\nname = "deft"\nrotate_rounds = 2\n',
}
STEPS, BATCH_ROWS = 8, 16
"""Local steps of a round for those that send deltas; rows of a step."""


@dataclass(frozen=True)
class Curve:
    """Accuracy after so many rows (passed forward, all devices) and so many seconds, of the devices' processors and of rounds."""

    rows: tuple[int, ...]
    cpu_s: tuple[float, ...]
    seconds: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Piece:
    """A split and a seed, on which every method's job runs in turn."""

    alpha: float
    seed: int

    @property
    def words(self) -> str:
        return f"{f'Dirichlet({self.alpha:g})' if self.alpha else 'IID'}, seed {self.seed}"

    def file(self, out: Path, learner: str) -> Path:
        split_ = f"dirichlet-{self.alpha:g}" if self.alpha else "iid"
        return out / f"{split_}-seed-{self.seed}-{learner.replace(' ', '-').replace(',', '')}.json"

    def deal(self, data: Path, folder: Path) -> list[Path]:
        """Each device's rows, in files of the same names for every piece."""
        return _dealt(data, folder, self.alpha, self.seed)


def _learning(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="deft-learning-") as scratch:
        out = Path(scratch) if options.out is None else options.out
        out.mkdir(parents=True, exist_ok=True)
        asyncio.run(_learn(options, out))
        for alpha in options.alphas:
            found = _learned(options, out, alpha)
            if not any(found.values()):
                continue
            text = _learning_table(found, alpha, options)
            print(text)
            if options.write:
                kind = "-dirichlet" if alpha else ""
                picture = _DOCS / f"deft{kind}.svg"
                picture.write_text(_picture({name: middle(curves) for name, curves in found.items()}), encoding="utf-8")
                image = f"![accuracy by rows and by processor seconds]({picture.name})"
                sections.put(f"deft-learning{kind}", f"{text}\n\n{image}\n\n{sections.measured(_command())}")
    return 0


async def _learn(options: argparse.Namespace, out: Path) -> None:
    """What is not there yet: a seed of all splits, then the next, since a seed of each says more than many of one."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    pieces = [Piece(alpha, seed) for seed in seeds for alpha in options.alphas]
    missing = [piece for piece in pieces if any(not _fits(piece.file(out, name), options) for name in options.learners)]
    if not missing:
        return
    begun_s, longest_s = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="deft-") as scratch:
        folder = Path(scratch)
        files = missing[0].deal(options.data, folder)

        def settings(number: int) -> list[str]:
            # Agents on one machine share its cores; more threads than cores would only wait for each other.
            chosen = ["--data", f"trec6={files[number]}", "--set", "training.cores=1"]
            return [*chosen, "--set", f"models.minilm={minilm_folder()}"]

        async with Fleet(folder, len(files), agent_options=settings) as fleet, fleet.client() as client:
            # Children are started, models loaded and devices measured, by each method's own way of training, before anybody's clock runs.
            warm = [await _followed(client, fleet, _learning_job(name, options, missing[0].seed, rounds=1)) for name in options.learners]
            used_s = sum(curve.cpu_s[-1] for curve in warm)
            print(f"{used_s:.0f} s of processors to load and measure, {time.monotonic() - begun_s:.0f} s in all", flush=True)
            for piece in missing:
                piece_s = time.monotonic()
                if piece_s - begun_s + longest_s > options.within_s:
                    print(f"{piece_s - begun_s:.0f} s are over, a seed may take {longest_s:.0f} s: the same command goes on from here")
                    return
                # Into the same files: an agent reads them for each task, and reads anew what has changed.
                piece.deal(options.data, folder)
                for name in options.learners:
                    if not _fits(piece.file(out, name), options):
                        curve = await _followed(client, fleet, _learning_job(name, options, piece.seed))
                        _keep(piece.file(out, name), curve, options)
                        print(f"{piece.words}, {name}: {_curve_words(curve)}", flush=True)
                longest_s = max(longest_s, time.monotonic() - piece_s)


def _curve_words(curve: Curve) -> str:
    used = f"{curve.cpu_s[-1]:.0f} s of the devices' processors, {curve.seconds[-1]:.0f} s of rounds"
    return f"accuracy {curve.accuracy[-1]:.4f} after {curve.rows[-1]:,} rows, {used}"


def _keep(file: Path, curve: Curve, options: argparse.Namespace) -> None:
    facts = {"rows_asked": options.rows, "learning_rate": options.learning_rate, "points": options.points}
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps({**facts, **asdict(curve)}, indent=1) + "\n", encoding="utf-8")
    aside.rename(file)


def _fits(file: Path, options: argparse.Namespace) -> bool:
    """Whether a file has what was asked for: of other rows or another rate it is measured again."""
    if not file.exists():
        return False
    told = json.loads(file.read_text(encoding="utf-8"))
    return bool(told["rows_asked"] == options.rows and told["learning_rate"] == options.learning_rate and told["points"] == options.points)


async def _followed(client: Client, fleet: Fleet, toml: str) -> Curve:
    """A job to its end. What the devices' processes had used is read as each round's end is told."""
    before_s = _cpu_s(fleet.agents)
    used_s: dict[int, float] = {}
    view = control_pb2.JobView()
    async for view in client.watch(await client.submit(toml)):
        fleet.check()
        for item in view.history:
            used_s.setdefault(item.round, _cpu_s(fleet.agents) - before_s)
    if view.state != control_pb2.JOB_STATE_COMPLETED:
        raise SystemExit(f"the job {watch.state_word(view.state)}: {view.message}")
    return _curve(view, used_s)


def _cpu_s(agents: Sequence[int]) -> float:
    """Processor seconds of agents and of all that they started, ended processes included."""
    parent: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # From the third of the line's fields on. User and system time, one's own and that of children waited for, are the 14th
                # to the 17th.
                words = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                parent[int(folder.name)] = int(words[1])
                ticks[int(folder.name)] = sum(int(word) for word in words[11:15])
    total = 0
    for process, own in ticks.items():
        above = process
        while above and above not in agents:
            above = parent.get(above, 0)
        total += own if above else 0
    return total / os.sysconf("SC_CLK_TCK")


def _learned(options: argparse.Namespace, out: Path, alpha: float) -> dict[str, list[Curve]]:
    """The curves of all seeds of which every method's is there."""
    found: dict[str, list[Curve]] = {name: [] for name in options.learners}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        files = {name: Piece(alpha, seed).file(out, name) for name in options.learners}
        if all(_fits(file, options) for file in files.values()):
            for name, file in files.items():
                told = json.loads(file.read_text(encoding="utf-8"))
                found[name].append(Curve(*(tuple(told[field.name]) for field in fields(Curve))))
    return found


def middle(curves: Sequence[Curve]) -> Curve:
    """Of the seeds' curves the median at each evaluation; rows differ where a device's own are few, or a device was left out."""

    def medians(parts: Sequence[Sequence[float]]) -> list[float]:
        return [statistics.median(values) for values in zip(*parts, strict=True)]

    return Curve(
        tuple(round(rows) for rows in medians([curve.rows for curve in curves])),
        tuple(medians([curve.cpu_s for curve in curves])),
        tuple(medians([curve.seconds for curve in curves])),
        tuple(medians([curve.accuracy for curve in curves])),
    )


def _dealt(data: Path, folder: Path, alpha: float, seed: int) -> list[Path]:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    if alpha > 0:
        of_rows = [str(row["label"]) for row in rows]
        shares = split.dirichlet_shares(of_rows, DEVICES, alpha, seed)
        return trec6.dealt_files(rows, split.by_shares(of_rows, shares, DEVICES, seed), folder)
    return trec6.dealt_files(rows, split.iid(len(rows), DEVICES, seed), folder)


def _learning_job(name: str, options: argparse.Namespace, seed: int, rounds: int = 0) -> str:
    labels = json.loads((options.data / "labels.json").read_text(encoding="utf-8"))
    gradients = name.endswith("gradients")
    steps = 1 if gradients else STEPS
    # DEFT trains one block on each row: as many rounds as pass the same number of rows forward.
    rounds = rounds or max(1, round(options.rows / (DEVICES * steps * BATCH_ROWS)))
    training = "" if gradients else f"steps = {steps}\n"
    return f"""
name = "learning"
seed = {seed}
{trec6.model_toml(labels)}[training]
{training}batch_size = {BATCH_ROWS}
learning_rate = {options.learning_rate}
{LEARNERS[name]}
[rounds]
count = {rounds}
[devices]
minimum = {DEVICES}
wait_s = 300
[evaluation]
source = "heldout"
heldout = {json.dumps(str((options.data / "test.jsonl").resolve()))}
every = {max(1, rounds // options.points)}
metric = "accuracy"
"""


def _curve(view: control_pb2.JobView, used_s: Mapping[int, float]) -> Curve:
    first = watch.metric_of(view.initial_metrics, "accuracy")
    assert first is not None
    rows, cpu_s, seconds, accuracy = [0], [0.0], [0.0], [first]
    passed, spent = 0, 0.0
    for item in view.history:
        passed += sum(task.samples for task in item.tasks)
        spent += item.ended_unix_s - item.started_unix_s
        if (measured := watch.metric_of(item.metrics, "accuracy")) is not None:
            rows.append(passed)
            cpu_s.append(used_s[item.round])
            seconds.append(spent)
            accuracy.append(measured)
    return Curve(tuple(rows), tuple(cpu_s), tuple(seconds), tuple(accuracy))


def _learning_table(found: Mapping[str, Sequence[Curve]], alpha: float, options: argparse.Namespace) -> str:
    how = f"Dirichlet({alpha:g})" if alpha else "IID"
    count = len(next(iter(found.values())))
    seeds = "" if count == 1 else f" Medians of {count} seeds, of split, adapter and order; least and greatest in brackets."
    lines = [
        f"## DEFT: what is learned by when, {how}" if alpha else "## DEFT: what is learned by when",
        "",
        f"TREC-6, MiniLM, LoRA r=8 on query and value, {DEVICES} devices of equal speed on one machine, {how}, batch {BATCH_ROWS}, "
        f"learning rate {options.learning_rate:g}. Rows are those passed forward, summed over devices; seconds are those of the devices' "
        "processors, agents and training processes together. Models were loaded and devices measured before."
        f"{seeds}",
        "",
        f"| method | rows | last accuracy | best | rows to {TARGET:g} | processor seconds to {TARGET:g} | in all |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, curves in found.items():
        curve = middle(curves)
        reached = next((index for index, value in enumerate(curve.accuracy) if value >= TARGET), None)
        rows = "-" if reached is None else f"{curve.rows[reached]:,}"
        seconds = "-" if reached is None else f"{curve.cpu_s[reached]:.0f}"
        lines.append(
            f"| {name} | {curve.rows[-1]:,} | {_spread([one.accuracy[-1] for one in curves])} "
            f"| {_spread([max(one.accuracy) for one in curves])} | {rows} | {seconds} | {curve.cpu_s[-1]:.0f} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """The median, and of several values the least and the greatest."""
    return f"{statistics.median(values):.3f}" + (f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else "")


def _picture(curves: Mapping[str, Curve]) -> str:
    by_rows = {name: list(zip(curve.rows, curve.accuracy, strict=True)) for name, curve in curves.items()}
    by_seconds = {name: list(zip(curve.cpu_s, curve.accuracy, strict=True)) for name, curve in curves.items()}
    panels = [plot.Panel("by rows", "rows", "accuracy", by_rows), plot.Panel("by work", "processor seconds", "accuracy", by_seconds)]
    return plot.svg(panels)


def _command() -> str:
    words = list(sys.argv)
    for option in ("--data", "--keep", "--out"):
        # Where they lie is this machine's own business.
        if option in words:
            words[words.index(option) + 1] = "FOLDER"
    return f"python {' '.join(words)}"


if __name__ == "__main__":
    sys.exit(main())
