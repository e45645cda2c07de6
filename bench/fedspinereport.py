"""What bench/fedspine.py measured: its files, the figures that follow from them, and the section for docs/benchmarks.md."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import plot
import sections

DEVICES = 8
ALPHA = 0.5
QUOTA_MAX, UP_MAX, DOWN_MAX = 1.0, 8e6, 32e6
"""Of a core of this machine; bits per second."""

SPREAD = 4.0
"""Of quotas and of links, log-uniform and independent of each other."""

RANK = 8
TARGET = 0.5
SLACK = 0.01
"""Below baseline (a)'s last accuracy: what is to be reached."""

FASTER_THAN_A, FASTER_THAN_B, POINTS_ABOVE_A = 1.4, 1.05, 0.4
LAST = 3
"""Rounds whose mean is the last accuracy."""

CONTESTANTS: Mapping[str, str] = {
    "fedspine": "FedSpine, a bandit's arms",
    "once": "(a) federated LoRA, pruned once, recovery",
    "fixed": "(b) one arm for all",
    "middle": f"(b) of rank {RANK // 2}",
    "hetlora": "HetLoRA, not pruned",
    "fedspine-warm": "FedSpine, first rounds without a cut",
    "fedspine-own": "FedSpine, each device cuts by its own importance",
    "once-own": "(a), each device by its own importance",
}
SHORT: Mapping[str, str] = {
    "fedspine": "FedSpine",
    "once": "(a)",
    "fixed": "(b)",
    "middle": f"(b) of rank {RANK // 2}",
    "hetlora": "HetLoRA",
    "fedspine-warm": "FedSpine with warm rounds",
    "fedspine-own": "FedSpine by own importance",
    "once-own": "(a) by own importance",
}
TITLES: Mapping[str, str] = {"trec6": "TREC-6", "sst2": "SST-2"}
_DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Setup:
    """What all contestants of a data set have in common."""

    rounds: int
    steps: int
    batch_rows: int
    tokens: int
    learning_rate: float
    tuned_rounds: int
    """Of (a), before it prunes."""
    recovery_rounds: int
    """Of those that prune step by step: the last rounds, in which nothing is cut any more."""
    warm_rounds: int
    """Of FedSpine with warm rounds: the first ones, in which nothing is cut."""
    curve_rows: int
    """Test rows that are measured after each round; all of them once everything is cut."""


@dataclass(frozen=True)
class Turn:
    """What one device did in one round; seconds on its own clock."""

    device: str
    rank: int
    pace: float
    sparsity: float
    compute_s: float
    sent_s: float
    fetched_s: float
    up_bytes: int
    down_bytes: int

    @property
    def seconds(self) -> float:
        return self.compute_s + self.sent_s + self.fetched_s


@dataclass(frozen=True)
class Round:
    turns: tuple[Turn, ...]
    accuracy: float
    """Mean over the devices, each with what it has left: everyone measures another eighth of the test rows."""

    @property
    def seconds(self) -> float:
        return max(turn.seconds for turn in self.turns)

    @property
    def waiting_s(self) -> float:
        """Mean over devices of the time until the slowest is done."""
        return statistics.fmean(self.seconds - turn.seconds for turn in self.turns)

    @property
    def pruned(self) -> bool:
        return all(turn.sparsity >= TARGET - 1e-9 for turn in self.turns)


@dataclass
class Told:
    """One contestant's run."""

    dataset: str
    method: str
    seed: int
    setup: dict[str, object]
    rounds: list[Round] = field(default_factory=list[Round])
    voted: float | None = None
    """Last accuracy of the one structure that the devices vote for; None where nothing is pruned."""
    cpu_s: float = 0.0

    @property
    def ends(self) -> list[float]:
        found: list[float] = []
        total = 0.0
        for done in self.rounds:
            total += done.seconds
            found.append(total)
        return found

    @property
    def last(self) -> float:
        return statistics.fmean(done.accuracy for done in self.rounds[-LAST:])

    def time_to(self, accuracy: float) -> float | None:
        """Until the first round after which all devices are at the sparsity and they reach the accuracy."""
        return next((end for end, done in zip(self.ends, self.rounds, strict=True) if done.pruned and done.accuracy >= accuracy), None)

    @property
    def time_to_sparsity(self) -> float | None:
        return self.time_to(0.0)


def write(told: Told, out: Path) -> None:
    path = place(out, told.dataset, told.method, told.seed)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(asdict(told), indent=1), encoding="utf-8")
    aside.replace(path)


def place(out: Path, dataset: str, method: str, seed: int) -> Path:
    return out / f"{dataset}-{method}-{seed}.json"


def read(path: Path) -> Told:
    found = json.loads(path.read_text(encoding="utf-8"))
    rounds = [Round(tuple(Turn(**turn) for turn in entry["turns"]), entry["accuracy"]) for entry in found.pop("rounds")]
    return Told(**found, rounds=rounds)


@dataclass(frozen=True)
class Verdict:
    """A figure that was to be reached."""

    words: str
    value: float
    least: float

    @property
    def met(self) -> bool:
        return self.value >= self.least


Runs = Mapping[int, Mapping[str, Told]]
"""Seed -> contestant -> what it told; only seeds of which there are FedSpine and (a)."""


def found(out: Path, dataset: str) -> Runs:
    by_seed: dict[int, dict[str, Told]] = {}
    for path in sorted(out.glob(f"{dataset}-*-*.json")):
        told = read(path)
        by_seed.setdefault(told.seed, {})[told.method] = told
    return {seed: runs for seed, runs in sorted(by_seed.items()) if {"fedspine", "once"} <= runs.keys()}


@dataclass(frozen=True)
class Match:
    """Two contestants, and whose last accuracy is the goal of both."""

    one: str
    other: str
    goal: str = "once"
    wanted: float | None = None

    def seeds(self, runs: Runs) -> list[Mapping[str, Told]]:
        """Of which there are all three."""
        return [each for each in runs.values() if {self.one, self.other, self.goal} <= each.keys()]

    def ratios(self, runs: Runs) -> list[float | None]:
        """By seed: the other's time to the goal by the one's; all of its time where it never came there. None where the one did not."""
        found: list[float | None] = []
        for each in self.seeds(runs):
            wanted = goal(each, self.goal)
            own = each[self.one].time_to(wanted)
            found.append((each[self.other].time_to(wanted) or each[self.other].ends[-1]) / own if own is not None else None)
        return found

    def points(self, runs: Runs) -> list[float]:
        """By seed: hundredths of accuracy by which the one ends above the other."""
        return [100 * (each[self.one].last - each[self.other].last) for each in self.seeds(runs)]


MATCHES = (
    Match("fedspine", "once", "once", FASTER_THAN_A),
    Match("fedspine", "fixed", "once", FASTER_THAN_B),
    Match("fedspine", "middle"),
    Match("fedspine-warm", "once"),
    Match("fedspine-warm", "fedspine"),
    Match("fedspine", "once-own", "once-own"),
    Match("fedspine-own", "once-own", "once-own"),
    Match("fedspine", "fedspine-own", "once-own"),
)


def goal(runs: Mapping[str, Told], of: str = "once") -> float:
    """The accuracy that a seed's contestants have to come to."""
    return runs[of].last - SLACK


def geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else 0.0


_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a two-sided interval of 95 %, by the number of values."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its interval of 95 %; infinite for one value."""
    mean = statistics.fmean(values)
    return mean, _T95.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def verdicts(dataset: str, runs: Runs) -> list[Verdict]:
    """A time ratio is met where FedSpine came to the goal in every seed."""
    done: list[Verdict] = []
    for match in MATCHES:
        if match.wanted is not None and (ratios := match.ratios(runs)):
            value = geometric([ratio for ratio in ratios if ratio is not None]) if None not in ratios else 0.0
            done.append(Verdict(f"time to the goal, {SHORT[match.other]} by {SHORT[match.one]}", value, match.wanted))
    if dataset == "sst2":
        done.append(Verdict("points of accuracy above (a)", statistics.fmean(MATCHES[0].points(runs)), POINTS_ABOVE_A))
    return done


def text(dataset: str, runs: Runs, command: str) -> str:
    """Markdown."""
    target = f"{100 * TARGET:.0f} %"
    columns = ("accuracy", "of the voted model", f"to {target}, s", "to the goal, s", "came there", "all rounds, s", "waiting, s a round")
    lines = [
        f"## FedSpine: {TITLES[dataset]}",
        "",
        *_how(runs),
        "",
        f"| method | {' | '.join(columns)} | sent, MB | fetched, MB |",
        "| --- |" + " --- |" * (len(columns) + 2),
        *(_line(name, words, runs) for name, words in CONTESTANTS.items() if any(name in each for each in runs.values())),
        "",
        "| compared | goal of | its time to the goal by the other's, by seed | points of accuracy above it, by seed | mean ± 95 % |",
        "| --- | --- | --- | --- | --- |",
        *(_compared(match, runs) for match in MATCHES if match.seeds(runs)),
        "",
        *(f"- {found.words}: {_value(found)}, wanted {found.least:g}: {_word(found)}." for found in verdicts(dataset, runs)),
        "",
        f"![accuracy and sparsity by seconds]({_picture_name(dataset)})",
        "",
        sections.measured(command),
    ]
    return "\n".join(lines)


def _value(verdict: Verdict) -> str:
    return f"{verdict.value:.2f}" if verdict.value else "FedSpine did not come there in every seed"


def _word(verdict: Verdict) -> str:
    return "met" if verdict.met else "**missed**"


def _how(runs: Runs) -> list[str]:
    setup = next(iter(runs.values()))["fedspine"].setup
    target = f"{100 * TARGET:.0f} %"
    quotas = f"{QUOTA_MAX / SPREAD:g} to {QUOTA_MAX:g} of a core"
    links = f"{UP_MAX / SPREAD / 1e6:g} to {UP_MAX / 1e6:g} Mbit/s up, {DOWN_MAX / SPREAD / 1e6:g} to {DOWN_MAX / 1e6:g} down"
    return [
        f"MiniLM, LoRA on all six linear layers, rank {RANK} at the most, {DEVICES} devices, Dirichlet({ALPHA:g}), "
        f"{setup['rounds']} rounds of {setup['steps']} steps of {setup['batch_rows']} rows, {setup['tokens']} tokens, "
        f"learning rate {setup['learning_rate']:g}; to {target} sparsity. Seeds {', '.join(map(str, runs))}, of split, links, adapter and "
        "order; how late (a) prunes was chosen on another one, by (a)'s own accuracy.",
        "",
        "One process, and a **virtual clock**: devices train one after another with the agent's own code on one thread; a device's seconds "
        f"are the process's CPU seconds by its quota ({quotas}, log-uniform), and bytes go at the rate of its link ({links}, dealt by the "
        "seed). A round lasts as long as its slowest device. Loading the model, evaluation and the fold are not counted. Arms, folds and "
        "structures are the coordinator's own code. That the method runs on real processes is shown elsewhere (tests, demo).",
        "",
        f"(a) is {setup['tuned_rounds']} rounds of federated LoRA, then one cut to {target} by the fleet's importance, which the last of "
        "these rounds gathers, then recovery, as two jobs; *by own importance*: each device cuts by its own, gathered in as many steps "
        f"more before the cut. {_warm(runs)}(b) is "
        'FedSpine with `arms = "fixed"`: half of what a round may cut, the highest rank; for reference also a job of rank '
        f"{RANK // 2}. HetLoRA pads with zeros, ranks by class of device. Accuracy is the mean of the last {LAST} rounds, test rows dealt "
        f"over the devices, each with what it has left. The goal is all devices at {target} *and* (a)'s last accuracy less "
        f"{100 * SLACK:g} point. Times are means over seeds.",
    ]


def _warm(runs: Runs) -> str:
    warm = next((each["fedspine-warm"].setup["warm_rounds"] for each in runs.values() if "fedspine-warm" in each), None)
    return f"With warm rounds FedSpine cuts nothing in the first {warm}. " if warm is not None else ""


def _compared(match: Match, runs: Runs) -> str:
    points = match.points(runs)
    mean, half = interval(points)
    times = ", ".join("never" if ratio is None else f"{ratio:.2f}" for ratio in match.ratios(runs))
    above = ", ".join(f"{value:+.1f}" for value in points)
    spread = f"{mean:+.2f} ± {half:.2f}" if math.isfinite(half) else f"{mean:+.2f}"
    return f"| {SHORT[match.one]} with {SHORT[match.other]} | {SHORT[match.goal]} | {times} | {above} | {spread} |"


def _line(name: str, words: str, runs: Runs) -> str:
    each = [(told, goal(of)) for of in runs.values() if (told := of.get(name)) is not None]
    tolds = [told for told, _ in each]
    voted = [told.voted for told in tolds if told.voted is not None]
    sparse = [end for told in tolds if (end := told.time_to_sparsity) is not None]
    came = [end for told, wanted in each if (end := told.time_to(wanted)) is not None]
    turns = [[turn for done in told.rounds for turn in done.turns] for told in tolds]
    cells = [
        f"{statistics.fmean(told.last for told in tolds):.4f}",
        _mean(voted, ".4f"),
        _mean(sparse, ".1f"),
        _mean(came, ".1f"),
        f"{len(came)} of {len(each)}",
        _mean([told.ends[-1] for told in tolds], ".1f"),
        _mean([statistics.fmean(done.waiting_s for done in told.rounds) for told in tolds], ".2f"),
        _mean([sum(turn.up_bytes for turn in some) / 1e6 for some in turns], ".1f"),
        _mean([sum(turn.down_bytes for turn in some) / 1e6 for some in turns], ".1f"),
    ]
    return f"| {words} | {' | '.join(cells)} |"


def _mean(values: Sequence[float], how: str) -> str:
    return format(statistics.fmean(values), how) if values else "–"


def _picture_name(dataset: str) -> str:
    return f"fedspine-{dataset}.svg"


def picture(runs: Runs) -> str:
    """Means over seeds after each round."""
    accuracy: dict[str, list[tuple[float, float]]] = {}
    sparsity: dict[str, list[tuple[float, float]]] = {}
    for name, words in CONTESTANTS.items():
        tolds = [each[name] for each in runs.values() if name in each]
        if not tolds:
            continue
        rounds = range(min(len(told.rounds) for told in tolds))
        ends = [statistics.fmean(told.ends[number] for told in tolds) for number in rounds]
        accuracy[words] = [(ends[n], statistics.fmean(told.rounds[n].accuracy for told in tolds)) for n in rounds]
        cut = [statistics.fmean(turn.sparsity for told in tolds for turn in told.rounds[n].turns) for n in rounds]
        sparsity[words] = list(zip(ends, cut, strict=True))
    return plot.svg([plot.Panel("accuracy", "seconds", "accuracy", accuracy), plot.Panel("cut", "seconds", "sparsity", sparsity)])


def put(dataset: str, runs: Runs, told: str) -> None:
    """Into docs/."""
    (_DOCS / _picture_name(dataset)).write_text(picture(runs), encoding="utf-8")
    sections.put(f"fedspine-{dataset}", told)
