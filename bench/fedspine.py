"""FedSpine beside pruning once, one arm for all, and unpruned HetLoRA: eight unequal devices in one process, on a clock of their own.

    .venv/bin/python bench/fedspine.py tune --data FOLDER --out FOLDER
    .venv/bin/python bench/fedspine.py run --data FOLDER --out FOLDER [--seeds 1 2 3 4 5]
    .venv/bin/python bench/fedspine.py report --out FOLDER [--write]

FOLDER of `--data` is that of a text classification: train.jsonl and test.jsonl with the columns text and label, labels.json with the
labels' names. What there is in `--out` is not computed again, so that a run may be stopped and gone on with.

Devices train one after another with the agent's own code; arms, folds and votes are the coordinator's own. A device's clock is the CPU
time of this process divided by the device's quota, so that its seconds do not depend on what else the machine does, and bytes take as
long as its link needs. A round lasts as long as its slowest device. The contestants of a seed take their rounds in turns: what disturbs
the processor itself disturbs all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fedspinereport as report
from fedspinereport import ALPHA, CONTESTANTS, DEVICES, DOWN_MAX, QUOTA_MAX, RANK, SPREAD, TARGET, UP_MAX, Round, Setup, Told, Turn
from minilm import minilm_folder

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")

SETUPS: Mapping[str, Setup] = {
    "trec6": Setup(12, 8, 16, 24, 2.5e-3, 6, 5, 2, 300),
    "sst2": Setup(18, 8, 16, 24, 1e-3, 12, 6, 4, 300),
}
"""Learning rates: the best of a few on the tuning seed. At TREC-6's, SST-2 is not learned."""

TUNED_ROUNDS: Mapping[str, Sequence[int]] = {"trec6": (4, 6), "sst2": (8, 12)}
"""What `tune` tries for (a): how late it prunes."""

TUNING_SEED = 0
TAU = 4


@dataclass(frozen=True)
class Job:
    """A job file and how many of its rounds are done."""

    toml: str
    rounds: int


def jobs(name: str, setup: Setup) -> tuple[Job, ...]:
    """A contestant's jobs, one after the other: the second begins with the first one's result."""
    if name == "hetlora":
        return (_job(setup, setup.rounds, f'name = "fedavg_lora"\naggregation = "zero-pad"\nranks = {{ {_classes()} }}\n'),)
    own = name.endswith("-own")
    if name.startswith("once"):
        # Where importance is the fleet's it is gathered in the last round of tuning; on each device, by steps more before it cuts.
        tuned = setup.tuned_rounds if own else setup.tuned_rounds - 1
        again = setup.rounds - tuned
        pruned = (
            f'{_spine(setup.steps, own)}arms = "fixed"\npace = 1.0\nprune_step = {TARGET}\nrecovery_rounds = {again - (1 if own else 2)}\n'
        )
        return _job(setup, tuned, 'name = "fedavg_lora"\naggregation = "exact"\n'), _job(setup, again, pruned)
    arms = 'arms = "bandit"\n' if name.startswith("fedspine") else 'arms = "fixed"\n'
    warm = f"warm_rounds = {setup.warm_rounds}\n" if name.endswith("-warm") else ""
    method = f"{_spine(TAU, own)}{arms}{warm}recovery_rounds = {setup.recovery_rounds}\n"
    return (_job(setup, setup.rounds, method, RANK // 2 if name == "middle" else RANK),)


def _spine(tau: int, own: bool) -> str:
    importance = "own" if own else "fleet"
    return f'name = "fedspine"\nsparsity = {TARGET}\nprune_every = {tau}\nprobe_rows = 8\nimportance = "{importance}"\n'


def _classes() -> str:
    """Ranks by class of hardware: the slowest, the middle, the fastest third."""
    ranks = [RANK // 4 if place < 3 else RANK // 2 if place < 5 else RANK for place in range(DEVICES)]
    return ", ".join(f'"d{place}" = {rank}' for place, rank in enumerate(ranks))


def _job(setup: Setup, rounds: int, method: str, rank: int = RANK) -> Job:
    toml = f"""
name = "fedspine"
seed = 0
[model]
base = {json.dumps(str(minilm_folder()))}
allow_hub = false
[task]
kind = "text-classification"
labels = LABELS
[lora]
rank = {rank}
alpha = {2 * rank}
targets = {json.dumps(TARGETS)}
[data]
name = "rows"
max_length = {setup.tokens}
[training]
steps = {setup.steps}
batch_size = {setup.batch_rows}
learning_rate = {setup.learning_rate}
[method]
update_dtype = "float16"
{method}
[rounds]
count = {rounds}
[devices]
minimum = {DEVICES}
[evaluation]
source = "none"
"""
    return Job(toml, rounds)


# -------------------------------------------------------------------------------------------------------------------- the fleet


@dataclass
class Device:
    """A board. `warm` and `memories` are what its training process would keep from round to round."""

    name: str
    quota: float
    up_bits_per_s: float
    down_bits_per_s: float
    rows: Path
    warm: dict[str, Any] = field(default_factory=dict[str, Any])  # Any: the session's type lives behind a late import
    memories: dict[str, Any] = field(default_factory=dict[str, Any])


class Clock:
    """Stands for the module `time` in the agent's code: a device's seconds are this process's CPU seconds by its quota."""

    def __init__(self, quota: float) -> None:
        self._quota = quota

    def monotonic(self) -> float:
        return time.process_time() / self._quota


def fleet(seed: int, dataset: str, rows: Sequence[Mapping[str, object]], folder: Path) -> list[Device]:
    """Devices d0 (the slowest) to d7 (the fastest); links and rows are dealt by the seed."""
    from fleetune.coordinator.demo import split

    chance = random.Random(f"{dataset}/{seed}")
    steps = [SPREAD ** (place / (DEVICES - 1) - 1.0) for place in range(DEVICES)]
    links = steps.copy()
    chance.shuffle(links)
    labels = [str(row["label"]) for row in rows]
    parts = split.by_shares(labels, split.dirichlet_shares(labels, DEVICES, ALPHA, seed), DEVICES, seed)
    found: list[Device] = []
    for number, part in enumerate(parts):
        path = folder / f"d{number}.jsonl"
        path.write_text("".join(json.dumps({"text": rows[i]["text"], "label": rows[i]["label"]}) + "\n" for i in part), encoding="utf-8")
        found.append(Device(f"d{number}", QUOTA_MAX * steps[number], UP_MAX * links[number], DOWN_MAX * links[number], path))
    return found


class Contest:
    """One contestant on one fleet: `step` does its next round."""

    def __init__(self, name: str, dataset: str, setup: Setup, seed: int, data: Path, folder: Path) -> None:
        self.told = Told(dataset, name, seed, asdict(setup))
        self._folder, self._seed, self._data, self._setup = folder, seed, data, setup
        folder.mkdir(parents=True)
        rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").split("\n") if line]
        self._devices = fleet(seed, dataset, rows, folder)
        self._jobs = list(jobs(name, setup))
        self._begun: _Running | None = None

    @property
    def over(self) -> bool:
        return self._begun is None and not self._jobs

    def step(self) -> None:
        began = time.process_time()
        if self._begun is None:
            job = self._jobs.pop(0)
            self._begun = _Running(job, self._devices, self._seed, self._data, self._folder, self._setup, len(self.told.rounds))
        running = self._begun
        self.told.rounds.append(running.round())
        if running.number == running.job.rounds:
            self.told.voted = running.voted_accuracy() if not self._jobs else None
            self._begun = None
        self.told.cpu_s += time.process_time() - began


class _Running:
    """A job under way."""

    def __init__(self, job: Job, devices: Sequence[Device], seed: int, data: Path, folder: Path, setup: Setup, before: int) -> None:
        from fleetune.coordinator import jobspec, recipes
        from fleetune.coordinator.methods.table import METHODS
        from fleetune.coordinator.rounds.arms import Spine
        from fleetune.coordinator.rounds.job import prune_settings
        from fleetune.model import accelerator as accelerators
        from fleetune.model import adapter, lora, recipe, slim
        from fleetune.wire import codec

        labels = json.loads((data / "labels.json").read_text(encoding="utf-8"))
        self.job, self._devices, self._seed, self._data, self._folder, self._before = job, devices, seed, data, folder, before
        self._spec = jobspec.parse(job.toml.replace("LABELS", json.dumps(labels)))
        self._recipe = recipes.recipe(self._spec)
        self._method = METHODS[self._spec.method.name]
        self._prune = prune_settings(self._spec) if self._method.prunes else None
        self._spines: dict[str, Spine] = {}
        self._importance = ""
        self._layout = slim.layout_of_folder(minilm_folder())
        self._state, self._setup = folder / "state.safetensors", setup
        self.number = 0
        if not before:
            accelerators.set_threads(1)
            made = lora.load(minilm_folder(), recipe.from_proto(self._recipe), accelerators.pick("cpu"), seed=seed)
            adapter.write_state(self._state, made)
            for device in devices:
                device.warm["session"] = _session(self._recipe)
        self._digest = codec.trainables_digest(codec.read_table(self._state))

    def round(self) -> Round:
        """Tasks, updates, fold, what the bandits learn, and the accuracy."""
        from fleetune.coordinator.domain import Blob, Candidate, RoundEntry, TaskEntry, Update
        from fleetune.coordinator.lora.rules import LoraFold
        from fleetune.coordinator.methods.base import RoundFacts
        from fleetune.coordinator.rounds import aggregate, arms, fleetimportance, layouts, lorafold
        from fleetune.coordinator.rounds.lorapairs import Leeway
        from fleetune.wire import codec

        self.number += 1
        names = {device.name: device.name for device in self._devices}
        entry = RoundEntry(self.number, "training", 0.0)
        if self._prune is not None:
            asked = [Candidate(device.name, device.name) for device in self._devices]
            self._spines, entry.prunings = arms.choose(self._prune, self._spines, asked, self.number, self.job.rounds, self._seed)
        payloads = self._method.assign(
            self._spec, RoundFacts(self.number, list(names), prunings=entry.prunings, names=names, importance=self._importance)
        )
        rule = self._method.fold(self._spec, self.number)
        assert isinstance(rule, LoraFold)
        layout = self._layout if self._prune is not None else None
        expected, down_bytes = codec.read_table(self._state), self._state.stat().st_size
        turns: list[Turn] = []
        parts: list[aggregate.Contribution] = []
        for device in self._devices:
            out, told = self._folder / f"{device.name}.update", entry.pruning_of(device.name)
            with _at(device):
                self._warm(device, told)
                began = time.process_time()
                trained = _trained(self._task(payloads[device.name], device), self._spec.method.name, self._state, out, device)
                compute_s = (time.process_time() - began) / device.quota
            facts = aggregate.inspect(out, expected, leeway=Leeway(rule.rank, layout))
            reached = layouts.reached(self._layout, told, facts.structure) if told is not None else 0.0
            rank = told.rank if told is not None else _rank(self._spec, device.name)
            sent_s, fetched_s = 8 * trained.size_bytes / device.up_bits_per_s, 8 * down_bytes / device.down_bits_per_s
            pace = told.pace if told is not None else 0.0
            turns.append(Turn(device.name, rank, pace, reached, compute_s, sent_s, fetched_s, trained.size_bytes, down_bytes))
            update = Update(
                Blob(trained.digest, trained.size_bytes),
                int(trained.report.samples),
                {metric.name: metric.value for metric in trained.report.metrics},
                ready_s=fetched_s + compute_s,
                sent_s=sent_s,
                structure=facts.structure,
                sparsity=reached,
                importance=facts.importance,
            )
            entry.tasks[device.name] = TaskEntry(device.name, device.name, device.name, "train", 1, "done", update=update)
            parts.append(aggregate.Contribution(device.name, out, update.samples))
        after = self._folder / "next.safetensors"
        lorafold.fold(aggregate.FoldPlan(self._state, tuple(parts), after, layout=layout), rule)
        after.replace(self._state)
        if self._prune is not None:
            self._spines = arms.learn(self._prune, self._spines, entry)
            if self._prune.shares:
                self._importance = fleetimportance.mean(entry) or self._importance
        return Round(tuple(turns), self._accuracy())

    def _task(self, payload: Any, device: Device) -> Any:  # Any: messages live behind a late import
        number = self._before + self.number
        task = _bare_task(self._recipe, self._digest)
        task.task_id, task.job_id, task.round, task.method = f"{device.name}/{number}", "job", self.number, self._spec.method.name
        task.payload.Pack(payload)
        # The same for every contestant, so that all see the same rows in the same order.
        task.seed = zlib.crc32(f"{self._seed}/{number}/{device.name}".encode())
        return task

    def _accuracy(self) -> float:
        right = 0.0
        tests = _tests(self._data, self._spec)
        if self._before + self.number < self._setup.rounds - self._setup.recovery_rounds:
            tests = tests[: self._setup.curve_rows]
        for place, device in enumerate(self._devices):
            spine = self._spines.get(device.name)
            with _at(device):
                right += self._measured(tests[place::DEVICES], bytes.fromhex(spine.structure) if spine is not None else None)
        return right / len(tests)

    def _model(self, structure: bytes | None) -> tuple[Any, Any]:  # Any: late imports
        """Session and, of a model that is pruned, what is left of it."""
        from fleetune.agent.trainer import data

        task = _bare_task(self._recipe, self._digest)
        if structure is None:
            return data.session(task, minilm_folder(), "cpu", 1, _quiet), None
        return data.slim_session(task, minilm_folder(), "cpu", 1, _quiet, structure)

    def _warm(self, device: Device, told: Any) -> None:
        """Model and rows are there when the clock begins to run, as on a device that has been asked before."""
        session, _ = self._model(bytes.fromhex(told.structure) if told is not None else None)
        session.examples(device.rows, None, _quiet)

    def _measured(self, items: Sequence[Any], structure: bytes | None) -> float:
        """Rows that the present model gets right, cut to the structure; None: whole."""
        from fleetune.model import adapter, evaluation

        session, slim = self._model(structure)
        if slim is None:
            adapter.load_state(session.adapted, self._state)
        else:
            slim.load(self._state, self._digest)
        return evaluation.evaluate(session.adapted, items).metrics["accuracy"] * len(items)

    def voted_accuracy(self) -> float | None:
        """Of one model for all: cut to the structure that the devices vote for by their rows."""
        from fleetune import consensus, structures

        if self._prune is None:
            return None
        votes = [
            (structures.from_bytes(self._layout, bytes.fromhex(self._spines[device.name].structure)), _count(device.rows))
            for device in self._devices
        ]
        found = consensus.voted(self._layout, votes, [self._spines[device.name].sparsity for device in self._devices])
        tests = _tests(self._data, self._spec)
        with _at(Device("all", 1.0, 1.0, 1.0, self._data, {"session": _session(self._recipe)})):
            return self._measured(tests, structures.to_bytes(self._layout, found)) / len(tests)


def _count(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def _rank(spec: Any, name: str) -> int:  # Any: a late import
    from fleetune.coordinator import loraranks

    return loraranks.rank_of(spec, name)


def _quiet(event: str, **fields: object) -> None:
    del event, fields


def _bare_task(recipe: Any, digest: str = "") -> Any:  # Any: messages live behind a late import
    """What every task of a job has."""
    from fleetune.v1 import messages_pb2

    task = messages_pb2.Task(recipe=recipe, trainables_digest=digest)
    task.base.digest = "minilm"
    return task


_LOADED: dict[bytes, Any] = {}


def _session(recipe: Any) -> Any:
    """A training child's model, loaded once and copied for each device."""
    from fleetune.agent.trainer import data

    key = recipe.SerializeToString(deterministic=True)
    if key not in _LOADED:
        with mock.patch.object(data, "_WARM", dict[str, Any]()):
            _LOADED[key] = data.session(_bare_task(recipe), minilm_folder(), "cpu", 1, _quiet)
    tokenizer = _LOADED[key].adapted.tokenizer
    return copy.deepcopy(_LOADED[key], {id(tokenizer): tokenizer})


_TESTS: dict[tuple[Path, int], list[Any]] = {}


def _tests(data: Path, spec: Any) -> list[Any]:
    """The test rows as tokens, shuffled, since files are sorted by who knows what."""
    key = (data, spec.data.max_length)
    if key not in _TESTS:
        from fleetune.coordinator import recipes
        from fleetune.model import batches, rows

        adapted = _session(recipes.recipe(spec)).adapted
        found = list(batches.encode(rows.read(data / "test.jsonl", None, adapted.recipe), adapted.recipe, adapted.tokenizer).items)
        random.Random(0).shuffle(found)
        _TESTS[key] = found
    return _TESTS[key]


@contextlib.contextmanager
def _at(device: Device) -> Generator[None]:
    """This process is that device's training child meanwhile: its clock, its warm model, what it remembers."""
    from fleetune.agent.methods import fedavg_lora, fedspine
    from fleetune.agent.trainer import data, loop

    clock = Clock(device.quota)
    with contextlib.ExitStack() as stack:
        for module in (fedavg_lora, fedspine, loop):
            stack.enter_context(mock.patch.object(module, "time", clock))
        stack.enter_context(mock.patch.object(data, "_WARM", device.warm))
        stack.enter_context(mock.patch.object(fedspine, "MEMORIES", device.memories))
        yield


def _trained(task: Any, method: str, state: Path, out: Path, device: Device) -> Any:  # Any: late imports
    from fleetune.agent.methods import fedavg_lora, fedspine
    from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work

    rows = DataFile(device.rows, None)
    work = Work(task, minilm_folder(), state, out, DeviceData(rows, rows), Limits(1, "cpu", None))
    return fedspine.train(work, _quiet) if method == "fedspine" else fedavg_lora.train(work, _quiet)


# ------------------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    run = parts.add_parser("run")
    run.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    run.add_argument("--methods", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    tune = parts.add_parser("tune", help="choose how late (a) prunes, by (a)'s own last accuracy on a seed of its own")
    for part in (run, tune):
        part.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="its name is that of the data set")
        part.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="results, one file for each contestant and seed")
    telling = parts.add_parser("report")
    telling.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    telling.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    options = parser.parse_args()
    return {"run": _run, "tune": _tune, "report": _report}[options.part](options)


def _run(options: argparse.Namespace) -> int:
    data, out = _folders(options)
    setup = _setup(out, data.name)
    for seed in options.seeds:
        _compete(data, out, seed, [(name, name, setup) for name in options.methods])
    return 0


def _tune(options: argparse.Namespace) -> int:
    data, out = _folders(options)
    setup = _best(data, out, [replace(SETUPS[data.name], tuned_rounds=rounds) for rounds in TUNED_ROUNDS[data.name]])
    path = out / f"{data.name}.setup"
    path.write_text(json.dumps(asdict(setup)), encoding="utf-8")
    print(f"{path}: {path.read_text(encoding='utf-8')}")
    return 0


def _best(data: Path, out: Path, setups: Sequence[Setup]) -> Setup:
    """The one with which (a) ends at the highest accuracy."""
    folder = out / "tuning"
    folder.mkdir(exist_ok=True)
    names = [f"once{setup.tuned_rounds}at{setup.learning_rate:g}" for setup in setups]
    _compete(data, folder, TUNING_SEED, [("once", name, setup) for name, setup in zip(names, setups, strict=True)])
    lasts = [report.read(report.place(folder, data.name, name, TUNING_SEED)).last for name in names]
    print(f"{data.name}: " + ", ".join(f"{name} {last:.4f}" for name, last in zip(names, lasts, strict=True)))
    return setups[lasts.index(max(lasts))]


def _folders(options: argparse.Namespace) -> tuple[Path, Path]:
    data, out = options.data.resolve(), options.out
    if data.name not in SETUPS:
        raise SystemExit(f"{data} is none of {', '.join(SETUPS)}; name the folder so.")
    out.mkdir(parents=True, exist_ok=True)
    return data, out


def _setup(out: Path, dataset: str) -> Setup:
    """What `tune` chose, or as it stands above."""
    path = out / f"{dataset}.setup"
    return Setup(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else SETUPS[dataset]


def _compete(data: Path, out: Path, seed: int, entries: Sequence[tuple[str, str, Setup]]) -> None:
    """Contestants (contestant, name of its file, setup) of which there is no file yet."""
    with tempfile.TemporaryDirectory(prefix="fedspine-") as scratch:
        contests = {
            name: Contest(contestant, data.name, setup, seed, data, Path(scratch) / name)
            for contestant, name, setup in entries
            if not report.place(out, data.name, name, seed).exists()
        }
        # In turns: what slows the processor down for a while slows them all.
        while open_ones := {name: contest for name, contest in contests.items() if not contest.over}:
            for name, contest in open_ones.items():
                contest.step()
                _say(contest.told)
                if contest.over:
                    report.write(replace(contest.told, method=name), out)


def _say(told: Told) -> None:
    done = told.rounds[-1]
    cut = statistics.fmean(turn.sparsity for turn in done.turns)
    print(
        f"{told.dataset} seed {told.seed} {told.method:<8} round {len(told.rounds):2}: accuracy {done.accuracy:.4f}, cut {cut:.3f}, "
        f"{done.seconds:.2f} s, waiting {done.waiting_s:.2f} s, {told.ends[-1]:.1f} s so far",
        flush=True,
    )


def _report(options: argparse.Namespace) -> int:
    met = True
    for dataset in SETUPS:
        runs = report.found(options.out, dataset)
        if not runs:
            continue
        where = f"--data FOLDER/{dataset} --out OUT"
        command = f"python bench/fedspine.py tune {where} && python bench/fedspine.py run {where} --seeds {' '.join(map(str, runs))}"
        told = report.text(dataset, runs, command)
        print(told, end="\n\n")
        met = met and all(verdict.met for verdict in report.verdicts(dataset, runs))
        if options.write:
            report.put(dataset, runs, told)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
