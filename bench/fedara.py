"""FedARA against federated LoRA on TREC-6: accuracy by the bytes that travel, and what a round's training takes.

    .venv/bin/python bench/fedara.py --data FOLDER [--seeds 3] [--write]

FOLDER holds train.jsonl and test.jsonl with the columns text and label. Devices are trained one after the other in this process by the
agent's own methods, and their updates folded and cut by the coordinator's own code; bytes are those of the files that would travel: each
device fetches the state and sends its update. Only the service between them is left out, so that two cores do. Seconds are the CPU's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sections
from google.protobuf.message import Message
from minilm import minilm_folder
from plot import Panel, svg

from fleetune.agent.methods import fedara, fedavg_lora
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Trained, Work
from fleetune.agent.trainer import data
from fleetune.coordinator import jobspec, recipes
from fleetune.coordinator.demo import split
from fleetune.coordinator.domain import Blob, RankSettings, RoundEntry, TaskEntry, Update
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.fedara import scores as scores_of
from fleetune.coordinator.methods.table import METHODS
from fleetune.coordinator.rounds import aggregate, lorafold, ranking, triplets
from fleetune.coordinator.rounds.job import rank_settings
from fleetune.model import accelerator as accelerators
from fleetune.model import adapter, batches, evaluation, lora, recipe, rows
from fleetune.model import triplets as models
from fleetune.v1 import messages_pb2
from fleetune.wire import codec

SECTION = "fedara"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "fedara.svg"
LABELS = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
ALL = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
MB = 1e6
SETTINGS = ("dirichlet", "devices", "rounds", "steps", "batch", "rank", "linears")
"""Options that a curve depends on, beside its arm and seed."""


@dataclass(frozen=True)
class Arm:
    """One way to train; `method` is the job's table of that name."""

    name: str
    method: Mapping[str, object]
    alpha: float
    learning_rate: float


@dataclass(frozen=True)
class Point:
    """After a round: bytes and CPU seconds of training of all devices since the start."""

    round: int
    accuracy: float
    megabytes: float
    train_s: float
    ranks: int
    modules: int


Curve = list[Point]
AGGREGATIONS = ("exact", "flora", "fedex")
"""Other ways than FedIT's to make one pair of many."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dirichlet", type=float, default=0.5, help="concentration of the split")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--linears", choices=["query,value", "all"], default="all", help="layers with an adapter")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lora", default="16,2e-3", help="alpha and learning rate of federated LoRA")
    parser.add_argument("--triplets", default="16,2e-3", help="the same of FedARA")
    parser.add_argument("--orthogonality", type=float, default=0.0)
    parser.add_argument("--end", type=float, default=0.25, help="share of the ranks that is left in the end")
    parser.add_argument("--arms", default="lora,fedara,kept", help=f"which of lora, {', '.join(AGGREGATIONS)}, fedara, vote, kept")
    parser.add_argument("--margin", type=float, default=0.01, help="the same accuracy is LoRA's best less so much")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--curves", type=Path, help="file to which finished curves are added, and from which those that it has are taken")
    parser.add_argument("--write", action="store_true", help="put the section and the picture into docs/")
    options = parser.parse_args()
    accelerators.set_threads(options.threads)
    arms = [arm for key, arm in _arms(options).items() if key in options.arms.split(",")]
    curves: dict[str, list[Curve]] = {}
    for seed, arm in itertools.product(range(options.first_seed, options.first_seed + options.seeds), arms):
        curves.setdefault(arm.name, []).append(_kept(options, arm, seed))
    text = _section(options, curves)
    print(text)
    if options.write:
        PICTURE.write_text(svg(_panels(curves)), encoding="utf-8")
        sections.put(SECTION, text)
    return 0


def _arms(options: argparse.Namespace) -> dict[str, Arm]:
    pairs, own = (tuple(map(float, words.split(","))) for words in (options.lora, options.triplets))
    ranked = {"name": "fedara", "update_dtype": "float16", "orthogonality": options.orthogonality}
    return {
        "lora": Arm("federated LoRA", {"name": "fedavg_lora", "update_dtype": "float16"}, *pairs),
        **{
            key: Arm(f"federated LoRA, {key}", {"name": "fedavg_lora", "update_dtype": "float16", "aggregation": key}, *pairs)
            for key in AGGREGATIONS
        },
        "fedara": Arm("FedARA", {**ranked, "ranks_end": options.end}, *own),
        "vote": Arm("FedARA, by vote", {**ranked, "ranks_end": options.end, "arbitration": "vote"}, *own),
        "kept": Arm("triplets, all kept", {**ranked, "ranks_end": 1.0}, *own),
    }


def _kept(options: argparse.Namespace, arm: Arm, seed: int) -> Curve:
    """A curve from the file, or made now and added to it: a run of hours may be cut off."""
    key = json.dumps([asdict(arm), seed, [getattr(options, name) for name in SETTINGS]])
    held: dict[str, list[list[float]]] = json.loads(options.curves.read_text()) if options.curves and options.curves.exists() else {}
    if key not in held:
        held[key] = [list(asdict(point).values()) for point in _curve(options, arm, seed)]
        if options.curves:
            options.curves.write_text(json.dumps(held))
    return [Point(int(p[0]), p[1], p[2], p[3], int(p[4]), int(p[5])) for p in held[key]]


# ---------------------------------------------------------------------------------------------------------------------- a run


def _spec(options: argparse.Namespace, arm: Arm, seed: int) -> jobspec.JobSpec:
    tables: dict[str, Mapping[str, object]] = {
        "model": {"base": str(minilm_folder()), "allow_hub": False},
        "task": {"kind": "text-classification", "labels": list(LABELS)},
        "lora": {"rank": options.rank, "alpha": arm.alpha, "targets": list(ALL) if options.linears == "all" else ["query", "value"]},
        "data": {"name": "trec6", "max_length": 64},
        "training": {"steps": options.steps, "batch_size": options.batch, "learning_rate": arm.learning_rate, "weight_decay": 0.01},
        "method": arm.method,
        "rounds": {"count": options.rounds},
    }
    lines = ['name = "trec6"', f"seed = {seed}"]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return jobspec.parse("\n".join(lines) + "\n")


def _curve(options: argparse.Namespace, arm: Arm, seed: int) -> Curve:
    spec = _spec(options, arm, seed)
    with tempfile.TemporaryDirectory(prefix="fedara-") as name:
        run = _Run(options, spec, Path(name), seed)
        curve: Curve = []
        for number in range(1, options.rounds + 1):
            curve.append(run.round(number, curve[-1] if curve else None))
            point = curve[-1]
            print(
                f"{arm.name} seed {seed} round {number}: accuracy {point.accuracy:.4f}, {point.megabytes:.3f} MB, "
                f"{point.train_s:.0f} s, {point.ranks} ranks in {point.modules} modules",
                flush=True,
            )
    data.forget()
    return curve


class _Run:
    """A job's state on disk, and a model to measure it with."""

    def __init__(self, options: argparse.Namespace, spec: jobspec.JobSpec, folder: Path, seed: int) -> None:
        self._spec, self._folder, self._seed = spec, folder, seed
        self._message = recipes.recipe(spec)
        self._recipe = recipe.from_proto(self._message)
        picked = accelerators.pick("cpu")
        self._of_triplets = models.load(minilm_folder(), self._recipe, picked, seed) if spec.method.name == "fedara" else None
        self._adapted = self._of_triplets.adapted if self._of_triplets else lora.load(minilm_folder(), self._recipe, picked, seed=seed)
        self._state = folder / "state.safetensors"
        adapter.write_state(self._state, self._adapted)
        table = codec.read_table(self._state)
        self._ranks = triplets.ranks_of(table)
        self._settings: RankSettings | None = None
        if self._of_triplets is not None:
            self._settings = replace(rank_settings(spec), first=sum(self._ranks.values()))
        self._test = batches.encode(rows.read(options.data / "test.jsonl", None, self._recipe), self._recipe, self._adapted.tokenizer)
        found = [json.loads(line) for line in (options.data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        labels = [str(row["label"]) for row in found]
        shares = split.dirichlet_shares(labels, options.devices, options.dirichlet, seed)
        self._files: list[Path] = []
        for place, part in enumerate(split.by_shares(labels, shares, options.devices, seed)):
            path = folder / f"rows-{place}.jsonl"
            own = [json.dumps({"text": found[i]["text"], "label": found[i]["label"]}) for i in part]
            path.write_text("\n".join(own) + "\n", encoding="utf-8")
            self._files.append(path)
        print(f"seed {seed}: rows per device {[len(path.read_text().splitlines()) for path in self._files]}", flush=True)

    def round(self, number: int, before: Point | None) -> Point:
        """Every device trains from the state; what is left of their mean is the next."""
        devices = [f"device-{place}" for place in range(len(self._files))]
        payloads = METHODS[self._spec.method.name].assign(self._spec, RoundFacts(number, devices, ranks=self._ranks))
        entry = RoundEntry(number, "folding", 0.0, ranks=dict(self._ranks))
        found: list[aggregate.Contribution] = []
        sent, train_s = 0, 0.0
        for device, file in zip(devices, self._files, strict=True):
            out = self._folder / f"{device}.safetensors"
            started = time.process_time()
            done = self._trained(number, device, payloads[device], file, out)
            train_s += time.process_time() - started
            sent += done.size_bytes + self._state.stat().st_size
            scores = ""
            if self._settings is not None:
                told = scores_of(done.report.payload.value)
                sent += sum(len(values) for values in told.values())
                scores = ranking.packed(told)
            update = Update(Blob(done.digest, done.size_bytes), int(done.report.samples), scores=scores)
            entry.tasks[device] = TaskEntry(device, device, device, "train", 1, "done", update=update)
            found.append(aggregate.Contribution(device, out, int(done.report.samples)))
        folded = self._folder / "folded.safetensors"
        plan = aggregate.FoldPlan(self._state, tuple(found), folded)
        rule = METHODS[self._spec.method.name].fold(self._spec, number)
        if isinstance(rule, LoraFold):
            lorafold.fold(plan, rule)
        else:
            aggregate.fold(plan)
        if self._settings is not None:
            alive = ranking.decided(self._settings, self._spec.rounds.count, entry)
            triplets.sliced(folded, folded, alive)
            self._ranks = ranking.left(alive)
        shutil.move(folded, self._state)
        pairs = sum("lora_A" in entry.name for entry in self._adapted.trainables)
        ranks = self._ranks or {str(place): self._spec.lora.rank for place in range(pairs)}
        before = before or Point(0, 0.0, 0.0, 0.0, 0, 0)
        return Point(number, self._accuracy(), before.megabytes + sent / MB, before.train_s + train_s, sum(ranks.values()), len(ranks))

    def _trained(self, number: int, device: str, payload: Message, file: Path, out: Path) -> Trained:
        task = messages_pb2.Task(task_id=f"job/{number}/{device}/train", job_id="job", round=number, recipe=self._message)
        task.seed = self._seed * 1000 + int(device.rpartition("-")[2])
        task.base.digest = "0" * 64
        task.payload.Pack(payload)
        work = Work(task, minilm_folder(), self._state, out, DeviceData(DataFile(file, None), None), Limits(1, "cpu", None))
        train = fedara.train if self._of_triplets is not None else fedavg_lora.train
        return train(work, lambda event, **fields: None)

    def _accuracy(self) -> float:
        if self._of_triplets is not None:
            self._of_triplets.load(self._state)
            measured = evaluation.evaluate(self._of_triplets.adapted, self._test.items)
        else:
            adapter.load_state(self._adapted, self._state)
            measured = evaluation.evaluate(self._adapted, self._test.items)
        return float(measured.metrics["accuracy"])


# ------------------------------------------------------------------------------------------------------------------ the figures


def _smooth(curve: Curve) -> list[float]:
    """The mean with the two rounds before: one round's accuracy on few rows is mostly luck."""
    values = [point.accuracy for point in curve]
    return [statistics.fmean(values[max(0, place - 2) : place + 1]) for place in range(len(values))]


def _reached(curve: Curve, target: float) -> Point | None:
    return next((point for point, value in zip(curve, _smooth(curve), strict=True) if value >= target), None)


def _section(options: argparse.Namespace, curves: Mapping[str, Sequence[Curve]]) -> str:
    base = curves.get("federated LoRA")
    where = "all six linear layers of a block" if options.linears == "all" else "query and value"
    lines = [
        "## FedARA: bytes until the same accuracy",
        "",
        f"MiniLM on TREC-6, rank {options.rank} beside {where}, {options.devices} devices by Dirichlet({options.dirichlet:g}), "
        f"{options.rounds} rounds of {options.steps} steps of {options.batch} rows, updates in float16, the state in float32. Alpha and "
        f"learning rate: {options.lora.replace(',', ' and ')} for LoRA, {options.triplets.replace(',', ' and ')} for triplets. FedARA goes "
        f"from all ranks to {options.end:.4g} of them. Devices train one after the other in one process, by the agent's and the "
        "coordinator's own code without the service between them; bytes are those of the files that would travel. The same accuracy is "
        f"LoRA's best, as a mean of three rounds, less {options.margin:g}, for each seed by itself.",
        "",
        "| | seeds | last accuracy | rounds until the same | MB until the same | LoRA's MB by own | MB in all | CPU seconds of training "
        "| ranks; modules left |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, of in curves.items():
        targets = [max(_smooth(curve)) - options.margin for curve in (base or of)]
        reached = [_reached(curve, target) for curve, target in zip(of, targets, strict=True)]
        theirs = [_reached(curve, target) for curve, target in zip(base or of, targets, strict=True)]
        ratios = [mine_of.megabytes / own.megabytes for own, mine_of in zip(reached, theirs, strict=True) if own and mine_of]
        ratio = f"**{statistics.median(ratios):.2f}**" if len(ratios) == len(of) else "-"
        cells = [
            _all(_smooth(curve)[-1] for curve in of),
            _all(point.round if point else None for point in reached),
            _all(point.megabytes if point else None for point in reached),
            ratio,
            _all(curve[-1].megabytes for curve in of),
            _all(curve[-1].train_s for curve in of),
            f"{_all(curve[-1].ranks for curve in of)}; {_all(curve[-1].modules for curve in of)}",
        ]
        lines.append(f"| {name} | {len(of)} | {' | '.join(cells)} |")
    places = {options.data: "FOLDER", options.curves: "FILE"}
    words = [places.get(Path(word), word) for word in sys.argv[1:]]
    command = f"python bench/fedara.py {' '.join(words)}"
    return "\n".join([*lines, "", "![Accuracy by rounds and by bytes](fedara.svg)", "", sections.measured(command)])


def _all(values: Iterable[float | None]) -> str:
    return ", ".join("-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" if v < 100 else f"{v:,.0f}" for v in values)


def _panels(curves: Mapping[str, Sequence[Curve]]) -> list[Panel]:
    def line(name: str, x: Callable[[Point], float]) -> list[tuple[float, float]]:
        of = curves[name]
        smooth = [_smooth(curve) for curve in of]
        return [
            (statistics.fmean(x(curve[place]) for curve in of), statistics.fmean(values[place] for values in smooth))
            for place in range(len(of[0]))
        ]

    return [
        Panel("by bytes", "MB, all devices", "accuracy", {name: line(name, lambda point: point.megabytes) for name in curves}),
        Panel("by rounds", "round", "accuracy", {name: line(name, lambda point: point.round) for name in curves}),
    ]


if __name__ == "__main__":
    sys.exit(main())
