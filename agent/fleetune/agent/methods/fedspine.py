"""Method `fedspine`: the device tunes LoRA pairs and cuts heads and neurons out of its model in turns; what comes back is both.

After FedSpine (arXiv:2501.02438), reconstructed from its abstract and from what others wrote of it. A round cuts `events` times and takes
`tau` local steps after each cut. What goes is what the gradients of the pairs say matters least, smoothed over local steps; rows and
columns are gone for good, from the frozen weights, the pairs, and AdamW's moments alike. The base on the disk stays whole: each task says
what the device's model has left, so a device that died, was installed anew or missed a round goes on from what the coordinator knows.

Where the task tells how much each unit matters to the whole fleet, what goes is what matters least to all; the device's own gradients
decide among equals. Importance of its own stays in this process's memory. Where neither is known the round's first cut is let be, as the
later ones catch up with it; where there is but one, some steps more come before it, in which the device trains and gathers importance.

| symbol | name |
| --- | --- |
| w_t | the state's part that the device has: kept rows and columns, the first `rank` directions |
| w_k | the model's trainables after the steps |
| Delta_k = w_k - w_t | the update, of what is left after the last cut, in `update_dtype` |
| n_k | `samples`: rows seen, once per pass |
| rho^{t-1}, rho^t | `sparsity_before`, `sparsity_after` |
| E, tau | `events`, `tau` |
| lambda | `importance_decay` |
| r_i, s_i | `rank`, `scale` |
| L0, L1 | `loss_before`, `loss_after`, on `probe_rows` rows of the device's own |
| eta | `learning_rate`, times the schedule |

Siblings: proto/fleetune/methods/v1/fedspine.proto, coordinator/fleetune/coordinator/methods/fedspine.py.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fleetune import architectures, importances, sparsity, structures
from fleetune.agent.methods import evaluating, inputs, plans, updates
from fleetune.agent.methods.memory import MemoryWatch
from fleetune.agent.methods.work import Trained, Work, peak_rss_bytes
from fleetune.agent.trainer import data, loop
from fleetune.child.entry import Emit
from fleetune.errors import ModelError, UnsupportedError
from fleetune.methods.v1 import fedspine_pb2
from fleetune.model import batches, evaluation
from fleetune.model.batches import Example
from fleetune.model.importance import Importance
from fleetune.model.lora import ADAPTER
from fleetune.model.slim import Slim
from fleetune.structures import Structure
from fleetune.v1 import messages_pb2

DEFAULT_PROBE_ROWS = 64
SPARSITY_MAX = 0.95
SCALE_KEY = "fleetune.lora_scale"
STRUCTURE_KEY = "fleetune.structure"
"""In the update's metadata: hex of what the model has left, which is what the shapes of its tensors follow."""

IMPORTANCE_KEY = "fleetune.importance"
"""There, too, where the task asks for it: how much each head and neuron matters."""

DEADLINE_SHARE = 0.8
"""Of the task's deadline, after which no step begins: the rest is for measuring, writing and sending."""

OBSERVED_EVERY = 2
"""Steps. Importance takes as long as a sixth of a step over 16 short rows; of every other batch the mean tells hardly less."""

OWN_SHARE = importances.SPAN / 255**2
"""What a device's own importance adds to the fleet's at the most: the least that the fleet's differ by."""

MEMORIES_KEPT = 2
"""Jobs whose importance is remembered; a child works on one at a time."""


def train(work: Work, emit: Emit) -> Trained:
    """A round of cuts and local steps from the task's structure and the global state; writes the delta to `work.out_path`."""
    started = time.monotonic()
    task = _payload(work)
    rows, out_path = inputs.places(work)
    session, slim = _slim(work, task, emit)
    architectures.check_targets(slim.layout, tuple(sorted(slim.adapted.model.peft_config[ADAPTER].target_modules)))
    examples = session.examples(rows.path, rows.file_format, emit)
    try:
        return _trained(work, task, slim, examples.items, out_path, emit, started)
    except BaseException:
        # A cut that failed half-way leaves a model that is not what its structure says.
        data.forget()
        raise


def evaluate(work: Work, emit: Emit) -> messages_pb2.Evaluation:
    """The state's metrics on the device's own validation rows; of a model cut to the task's structure where it gives one."""
    task = _payload(work) if work.task.HasField("payload") else fedspine_pb2.FedspineTask()

    def loaded(work: Work, emit: Emit) -> data.Session:
        session, slim = _slim(work, task, emit)
        # At full rank: what a device is left with has the state merged into it, whatever rank it could train.
        slim.load(work.state_path, work.task.trainables_digest)
        return session

    return evaluating.evaluate(work, emit, loaded)


def _slim(work: Work, task: fedspine_pb2.FedspineTask, emit: Emit) -> tuple[data.Session, Slim]:
    limits = work.limits
    return data.slim_session(work.task, work.base_folder, limits.accelerator, limits.threads, emit, task.structure)


def _trained(
    work: Work, task: fedspine_pb2.FedspineTask, slim: Slim, items: Sequence[Example], out_path: Path, emit: Emit, started: float
) -> Trained:
    state = slim.load(work.state_path, work.task.trainables_digest, int(task.rank), task.scale)
    known = _recalled(work.task, slim.structure)
    stop_at = started + DEADLINE_SHARE * work.task.deadline_s if work.task.deadline_s > 0 else math.inf
    pruner = Pruner(slim, task, known, stop_at, emit)
    loaded = time.monotonic()
    batch_rows = plans.batch_rows(task)
    measured = _probe(slim, items, int(task.probe_rows) or DEFAULT_PROBE_ROWS, batch_rows)
    loss_before = measured()
    memory = MemoryWatch(slim, work.limits)
    plan = plans.plan(task, work, len(items), steps=_round(task).steps, extra_steps=pruner.gathering_steps)
    # What a row keeps is measured anew: it falls with the structure and the rank.
    outcome = loop.train(slim.adapted, items, plan, emit, watcher=pruner)
    taken = memory.figures()
    loss_after = measured()
    done = time.monotonic()
    structure = structures.to_bytes(slim.layout, slim.structure)
    norm = slim.product_change(state)
    metadata = {SCALE_KEY: repr(slim.scale), STRUCTURE_KEY: structure.hex()}
    scores = pruner.scores()
    if task.importance and scores is not None and importances.is_told(slim.layout):
        metadata[IMPORTANCE_KEY] = importances.to_text(scores.values)
    written, _ = updates.write(out_path, slim.changes(state), "delta", task.update_dtype, metadata)
    _remember(work.task, known, scores)
    report = messages_pb2.UpdateReport(samples=outcome.samples, peak_rss_bytes=peak_rss_bytes())
    figures = {
        "loss": outcome.mean_loss,
        "loss_before": loss_before,
        "loss_after": loss_after,
        "sparsity": structures.sparsity(slim.layout, slim.structure),
        "update_norm": norm,
        "step_s": outcome.step_s,
        "steps": outcome.steps,
        **taken,
    }
    for name, value in figures.items():
        report.metrics.add(name=name, value=value)
    for name, seconds in (("load", loaded - started), ("train", done - loaded), ("write", time.monotonic() - done)):
        report.seconds.add(name=name, value=seconds)
    report.payload.Pack(
        fedspine_pb2.FedspineReport(
            structure=structure,
            steps=outcome.steps,
            mean_loss=outcome.mean_loss,
            loss_before=loss_before,
            loss_after=loss_after,
            batch_size=outcome.micro_rows,
            step_s=outcome.step_s,
            update_norm=norm,
            parameters_left=structures.parameters(slim.layout, slim.structure),
            parameters=slim.layout.prunable_parameters,
            pruning_s=pruner.seconds,
        )
    )
    return Trained(report, written.digest, written.size_bytes)


def _probe(slim: Slim, items: Sequence[Example], wanted_rows: int, batch_rows: int) -> Callable[[], float]:
    """Measures the loss on the same rows whenever it is called, in every round."""
    chosen = [items[index] for index in batches.sample(len(items), wanted_rows, "probe")]
    return lambda: float(evaluation.evaluate(slim.adapted, chosen, batch_rows).metrics["loss"])


def _payload(work: Work) -> fedspine_pb2.FedspineTask:
    task = fedspine_pb2.FedspineTask()
    if not work.task.payload.Unpack(task):
        raise UnsupportedError(
            f"The task holds {work.task.payload.type_url!r}, FedspineTask is expected.", "Use the same version of Fleetune on both sides."
        )
    updates.check_dtype(task.update_dtype)
    return task


def _round(task: fedspine_pb2.FedspineTask) -> sparsity.Round:
    before, after = task.sparsity_before, task.sparsity_after
    if not 0.0 <= before <= after <= SPARSITY_MAX or task.events < 1 or task.tau < 1 or not 0.0 <= task.importance_decay < 1.0:
        raise ModelError(
            f"The task prunes from {before:g} to {after:g} in {task.events} times {task.tau} steps with the decay "
            f"{task.importance_decay:g}; sparsity may rise from 0 to {SPARSITY_MAX:g}, times and steps begin at 1, decays end below 1.",
            "This is a bug of the coordinator; report it.",
        )
    return sparsity.Round(before, after, int(task.events), int(task.tau))


# -------------------------------------------------------------------------------------------------------------------- pruning


class Pruner:
    """Cuts before the steps that the round says, by what it sees of the gradients after every step."""

    def __init__(self, slim: Slim, task: fedspine_pb2.FedspineTask, known: _Scores | None, stop_at: float, emit: Emit) -> None:
        self._slim = slim
        self._round = _round(task)
        self._stop_at = stop_at
        self._emit = emit
        self._fleet = importances.from_text(slim.layout, task.fleet_importance) if task.fleet_importance else None
        # Recovery needs no importance; what was known before it stays as it was.
        self._prunes = self._round.after > self._round.before
        gathers = self._prunes or (task.importance and known is None)
        self._importance = Importance(slim.pruned, task.importance_decay) if gathers else None
        self._known = known
        if self._importance is not None and known is not None:
            self._importance.restore(known.values, known.steps)
        self._seen = known is not None
        """Whether the gradients of any step since the last cut, or of earlier rounds before the first, could be used."""
        blind = self._prunes and known is None and self._fleet is None
        self.gathering_steps = max(1, int(task.gathering_steps)) if blind and self._round.events == 1 else 0
        self._step = 0
        self.seconds = 0.0

    def before(self, step: int, optimiser: torch.optim.Optimizer) -> loop.Word:
        self._step = step
        if step and time.monotonic() >= self._stop_at:
            self._emit("log", text=f"the deadline is near: {step} steps are all of this round")
            return "stop"
        wanted = self._round.at(step - self.gathering_steps) if step >= self.gathering_steps else None
        if not self._prunes or self._importance is None or wanted is None:
            return "go"
        if not self._seen and self._fleet is None:
            why = "no gradient since the last cut was finite" if step else "nothing is known of this model's gradients yet"
            self._emit("log", text=f"nothing is cut: {why}")
            return "go"
        began = time.monotonic()
        changed = self._cut(self._importance, wanted, optimiser)
        self.seconds += time.monotonic() - began
        return "changed" if changed else "go"

    def observe(self) -> None:
        since = self._step - self.gathering_steps
        every = min(OBSERVED_EVERY, self._round.tau)
        # The last step before a cut is one of them where `tau` is even.
        if self._importance is None or (since >= 0 and since % every != every - 1):
            return
        began = time.monotonic()
        if self._importance.observe():
            self._seen = True
        self.seconds += time.monotonic() - began

    def scores(self) -> _Scores | None:
        """To begin the next round with."""
        if self._importance is None:
            return self._known
        if self._importance.steps == 0:
            return None
        values = tuple(array("f", group) for group in self._importance.scores())
        return _Scores(self._slim.structure, values, self._importance.steps)

    def _cut(self, importance: Importance, wanted: float, optimiser: torch.optim.Optimizer) -> bool:
        slim, own = self._slim, importance.scores()
        scores = own if self._fleet is None else _among_equals(self._fleet, own)
        after = structures.choose(slim.layout, slim.structure, sparsity.keeps(slim.layout, wanted), scores)
        if not slim.pruned.cut_to(after, optimiser):
            return False
        self._seen = False
        gone = structures.sparsity(slim.layout, after)
        self._emit("log", text=f"cut to structure {after.version}: {100 * gone:.1f} % of the prunable parameters are gone")
        return True


def _among_equals(fleet: importances.Scores, own: importances.Scores) -> importances.Scores:
    """The fleet's scores, in which a device's own count for less than a step of a byte."""
    return [
        [value + (OWN_SHARE * mine / most if most > 0 else 0.0) for value, mine in zip(of_all, of_device, strict=True)]
        for of_all, of_device, most in ((group, mine, max(mine, default=0.0)) for group, mine in zip(fleet, own, strict=True))
    ]


# ----------------------------------------------------------------------------------------------------------------- importance


@dataclass(frozen=True)
class _Scores:
    """What `Importance.scores` gave for a model of this structure, after so many observed steps."""

    structure: Structure
    values: tuple[array[float], ...]
    steps: int


@dataclass(frozen=True)
class _Memory:
    """Importance as round `number` of a job found it and left it."""

    number: int
    before: _Scores | None
    after: _Scores | None


MEMORIES: dict[str, _Memory] = {}
"""By job. A new process begins without any, and is none the worse for it but for some steps."""


def _recalled(task: messages_pb2.Task, structure: Structure) -> _Scores | None:
    """What earlier rounds of the job left that tells of every unit of `structure`; None where there is no such thing.

    A round that is done again begins with what it began with the first time, so that it gives the same bytes. After an update that was
    lost, the coordinator's structure has units that are cut here; what was known before they were cut serves then.
    """
    memory = MEMORIES.get(task.job_id)
    if memory is None or task.round < memory.number:
        return None
    found = (memory.before,) if task.round == memory.number else (memory.after, memory.before)
    return next((scores for scores in found if scores is not None and structures.nested(structure, scores.structure)), None)


def _remember(task: messages_pb2.Task, before: _Scores | None, after: _Scores | None) -> None:
    MEMORIES.pop(task.job_id, None)
    while len(MEMORIES) >= MEMORIES_KEPT:
        del MEMORIES[next(iter(MEMORIES))]
    MEMORIES[task.job_id] = _Memory(int(task.round), before, after)
