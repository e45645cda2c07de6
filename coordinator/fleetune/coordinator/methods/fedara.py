"""Method `fedara`: adapters of triplets lose ranks under a falling budget, and modules without any leave the job.

Paper: FedARA (arXiv:2501.14406), reconstructed from its abstract; what is ours stands in docs/methods.md. Parametrisation, scores and the
cubic budget: AdaLoRA (Zhang et al. 2023), as in peft.
Idea: an adapter is B diag(E) A, a sum of triplets. Devices train all that are alive and score them by their gradients; the coordinator
takes the weighted mean of A, B and E, each by itself, and keeps as many triplets as the round's budget has, the same for all devices. What
is dropped is gone: neither sent nor held nor computed, and a module that has lost its last triplet costs nothing any more.

    symbol      name in code
    r_m         RoundFacts.ranks            triplets of module m
    s           lora.alpha / lora.rank      of every module, whatever it has left
    b_0, b_T    all triplets, method.ranks_end of them
    t_w, t_f    method.warm_share, method.final_share, times the rounds
    T_h         method.vote_threshold
    gamma       method.orthogonality

Siblings: proto/fleetune/methods/v1/fedara.proto, agent/fleetune/agent/methods/fedara.py. Decisions: rounds/ranking.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError, Message

from fleetune.coordinator import loraranks
from fleetune.coordinator.domain import UpdateKind
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.methods.base import Initial, RoundFacts
from fleetune.errors import WireError
from fleetune.methods.v1 import fedara_pb2


class Fedara:
    name = "fedara"
    needs_model = True
    plans = False
    prunes = False

    def assign(self, spec: JobSpec, facts: RoundFacts) -> Mapping[str, Message]:
        """The same task for every device: all hold the same triplets."""
        training, method = spec.training, spec.method
        task = fedara_pb2.FedaraTask(
            ranks=facts.ranks,
            scale=loraranks.scale(spec),
            orthogonality=method.orthogonality,
            steps=training.steps,
            epochs=training.epochs,
            batch_size=training.batch_size,
            gradient_accumulation=training.gradient_accumulation,
            learning_rate=training.learning_rate,
            schedule=training.schedule,
            warmup_steps=training.warmup_steps,
            schedule_offset=(facts.number - 1) * training.steps,
            schedule_total=spec.rounds.count * training.steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            update_dtype=method.update_dtype,
        )
        return dict.fromkeys(facts.devices, task)

    def fold(self, spec: JobSpec, number: int) -> None:
        """The plain means."""

    def kinds(self, spec: JobSpec) -> frozenset[UpdateKind]:
        return frozenset({"delta"})

    def initial(self, spec: JobSpec, path: Path) -> Initial:
        raise NotImplementedError("the model host makes this method's first state")


def scores(report: bytes) -> dict[str, bytes]:
    """Module -> its triplets' scores as a device has sent them, unchecked. WireError for what is no report or names a module twice."""
    try:
        message = fedara_pb2.FedaraReport.FromString(report)
    except DecodeError as error:
        raise WireError("the update's report cannot be read; use the same version of Fleetune on both sides.") from error
    found = {item.module: item.float16 for item in message.scores}
    if len(found) != len(message.scores):
        raise WireError("the update's report scores a module twice; once is asked for.")
    return found


METHOD = Fedara()
