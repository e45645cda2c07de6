"""Method `fedara`: some local steps on triplet adapters; what comes back is how they moved, and a score for each triplet.

After FedARA (arXiv:2501.14406), reconstructed from its abstract; parametrisation and scores are AdaLoRA's (Zhang et al. 2023). The task
names the modules that have an adapter in this round, and their ranks. All others are the plain layers of the base: nothing of an adapter is
computed there, and the backward pass ends at the lowest module that has one. Scores begin anew in each round, as AdamW does: those of
another state's gradients would have to travel.

| symbol | name |
| --- | --- |
| w_t | the state that was loaded, `anchors` |
| w_k | the model's trainables after the steps |
| Delta_k = w_k - w_t | the update, in `update_dtype` |
| n_k | `samples`: rows seen, once per pass |
| r_m | `ranks` |
| s | `scale` |
| gamma | `orthogonality` |
| eta | `learning_rate`, times the schedule |

Siblings: proto/fleetune/methods/v1/fedara.proto, coordinator/fleetune/coordinator/methods/fedara.py.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping, Sequence

import torch

from fleetune.agent.methods import evaluating, inputs, plans, updates
from fleetune.agent.methods.work import Trained, Work, peak_rss_bytes
from fleetune.agent.trainer import data, loop
from fleetune.child.entry import Emit
from fleetune.errors import ModelError, UnsupportedError
from fleetune.methods.v1 import fedara_pb2
from fleetune.model import svdadapter
from fleetune.model.svdadapter import TripletScores
from fleetune.model.triplets import Triplets
from fleetune.v1 import messages_pb2

SCORE_MAX = 65504.0
"""The largest float16. The mean of a device's scores is 1."""


def train(work: Work, emit: Emit) -> Trained:
    """Local steps from the global state; writes the delta to `work.out_path`."""
    started = time.monotonic()
    task = _payload(work)
    rows, out_path = inputs.places(work)
    session, model = data.triplet_session(work.task, work.base_folder, work.limits.accelerator, work.limits.threads, emit)
    examples = session.examples(rows.path, rows.file_format, emit)
    model.load(work.state_path, work.task.trainables_digest, task.scale)
    _check_ranks(task, model)
    adapted = model.adapted
    anchors = [parameter.detach().clone() for parameter in adapted.parameters]
    watcher = Watcher(model, task.orthogonality)
    loaded = time.monotonic()
    # What a row keeps is measured anew: it falls with the modules that have an adapter.
    plan = plans.plan(task, work, len(examples), steps=int(task.steps), epochs=task.epochs)
    outcome = loop.train(adapted, examples.items, plan, emit, watcher=watcher)
    trained = time.monotonic()
    pairs = zip(adapted.trainables, anchors, strict=True)
    deltas = ((entry.name, entry.parameter.detach() - anchor) for entry, anchor in pairs)
    written, norm = updates.write(out_path, deltas, "delta", task.update_dtype)
    report = messages_pb2.UpdateReport(samples=outcome.samples, peak_rss_bytes=peak_rss_bytes())
    for name, value in {"loss": outcome.mean_loss, "step_s": outcome.step_s}.items():
        report.metrics.add(name=name, value=value)
    for name, seconds in (("load", loaded - started), ("train", trained - loaded), ("write", time.monotonic() - trained)):
        report.seconds.add(name=name, value=seconds)
    report.payload.Pack(
        fedara_pb2.FedaraReport(
            scores=packed(watcher.scores.scores()),
            steps=outcome.steps,
            mean_loss=outcome.mean_loss,
            last_loss=outcome.last_loss,
            batch_size=outcome.micro_rows,
            step_s=outcome.step_s,
            update_norm=norm,
            scored_steps=watcher.scores.steps,
        )
    )
    return Trained(report, written.digest, written.size_bytes)


def evaluate(work: Work, emit: Emit) -> messages_pb2.Evaluation:
    """The state's metrics on the device's own validation rows; its ranks are those that the state has."""
    task = _payload(work)

    def loaded(work: Work, emit: Emit) -> data.Session:
        session, model = data.triplet_session(work.task, work.base_folder, work.limits.accelerator, work.limits.threads, emit)
        model.load(work.state_path, work.task.trainables_digest, task.scale)
        return session

    return evaluating.evaluate(work, emit, loaded)


class Watcher:
    """Sees each step's gradients: scores the triplets by those of the rows, then adds the penalty's own."""

    def __init__(self, model: Triplets, orthogonality: float) -> None:
        self._model = model
        self._orthogonality = orthogonality
        self.scores = TripletScores(model.adapters)

    def before(self, step: int, optimiser: torch.optim.Optimizer) -> loop.Word:
        return "go"

    def observe(self) -> None:
        self.scores.observe()
        if self._orthogonality > 0 and self._model.adapters:
            # Here gradients are whole and without a scale, however many forward passes they took; the penalty is of no row.
            penalty = self._orthogonality * svdadapter.orthogonality(self._model.adapters)
            penalty.backward()  # type: ignore[no-untyped-call]  # torch leaves this one unannotated


def packed(scores: Mapping[str, Sequence[float]]) -> list[fedara_pb2.TripletScores]:
    """By module, so that their mean over all is 1, as float16. The scores themselves are products of two small numbers each, and the
    least that float16 holds is larger than many of them."""
    total = math.fsum(value for values in scores.values() for value in values)
    count = sum(len(values) for values in scores.values())
    factor = count / total if total > 0 and math.isfinite(total) else 0.0
    return [
        fedara_pb2.TripletScores(
            module=module, float16=struct.pack(f"<{len(values)}e", *(min(SCORE_MAX, value * factor) if factor else 0.0 for value in values))
        )
        for module, values in sorted(scores.items())
    ]


def _payload(work: Work) -> fedara_pb2.FedaraTask:
    task = fedara_pb2.FedaraTask()
    if not work.task.payload.Unpack(task):
        raise UnsupportedError(
            f"The task holds {work.task.payload.type_url!r}, FedaraTask is expected.", "Use the same version of Fleetune on both sides."
        )
    updates.check_dtype(task.update_dtype)
    if not 0 < task.scale < math.inf or not 0 <= task.orthogonality < math.inf:
        raise ModelError(
            f"The task's scale is {task.scale:g} and its orthogonality {task.orthogonality:g}; a number above 0 and one at or above it are "
            "allowed.",
            "This is a bug of the coordinator; report it.",
        )
    return task


def _check_ranks(task: fedara_pb2.FedaraTask, model: Triplets) -> None:
    wanted, found = dict(task.ranks), model.ranks
    if wanted != found:
        name = min(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ModelError(
            f"The task gives {name} the rank {wanted.get(name, 0)}, the state has {found.get(name, 0)}.",
            "This is a bug of the coordinator; report it.",
        )
