"""Method `fedspine`: devices tune LoRA pairs and cut heads and neurons out of the frozen layers in turns, each at its own pace.

Paper: FedSpine (arXiv:2501.02438), reconstructed from its abstract and from what others wrote of it; what is ours stands in
docs/methods.md. Importance: after LoRAPrune (Zhang et al. 2023). Aggregation: the exact mean of the products over those devices that
kept a row or column, as in `lora.rules`.
Idea: a fine-tuned model should also be small enough to run on the device. In each round a bandit per device picks how much to cut and
of which rank its pairs are, from how the loss fell, how much was cut and how long the device took beside the others. Importance comes from
the gradients of the pairs, which training makes anyway; devices tell it, and their mean says what goes next on all of them. What a device
keeps is known here, so a task says it all: a device may die, be installed anew or miss a round, and nothing has to be agreed upon
afterwards.

    symbol      name in code
    rho_target  method.sparsity
    rho_i       Pruning.sparsity_before, sparsity_after
    a_i, r_i    Pruning.pace, Pruning.rank
    tau         method.prune_every
    lambda      method.importance_decay
    s           lora.alpha / lora.rank, of every device whatever its rank

Siblings: proto/fleetune/methods/v1/fedspine.proto, agent/fleetune/agent/methods/fedspine.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from fleetune.coordinator import loraranks
from fleetune.coordinator.domain import Pruning, UpdateKind
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods.base import Initial, RoundFacts
from fleetune.methods.v1 import fedspine_pb2

TELLERS_MAX = 64
"""Devices of a round that tell it for the next one: more would change the mean by little, and all of it is stored with the open round."""


def tells_importance(spec: JobSpec, number: int) -> bool:
    """Whether devices tell the importance of heads and neurons in a round: for the fleet's next cuts where it is shared, and once it
    changes no more, for whoever takes the job's result."""
    return spec.method.importance == "fleet" or is_settled(spec, number)


def is_settled(spec: JobSpec, number: int) -> bool:
    """Whether a round's importance is as the last ones' is: nothing is cut after it but by devices that are late."""
    return number >= spec.rounds.count - spec.method.recovery_rounds


def _tellers(spec: JobSpec, facts: RoundFacts) -> frozenset[str]:
    if not tells_importance(spec, facts.number):
        return frozenset()
    devices = [pruning.device_id for pruning in facts.prunings]
    if is_settled(spec, facts.number) or len(devices) <= TELLERS_MAX:
        return frozenset(devices)
    return frozenset(sorted(devices, key=lambda device: zlib.crc32(f"{facts.number}/{device}".encode()))[:TELLERS_MAX])


class Fedspine:
    name = "fedspine"
    needs_model = True
    plans = False
    prunes = True

    def assign(self, spec: JobSpec, facts: RoundFacts) -> Mapping[str, Message]:
        """A task for every device that the round has a pruning for."""
        tellers = _tellers(spec, facts)
        return {pruning.device_id: self._task(spec, facts, pruning, pruning.device_id in tellers) for pruning in facts.prunings}

    def _task(self, spec: JobSpec, facts: RoundFacts, pruning: Pruning, tells: bool) -> Message:
        training, method = spec.training, spec.method
        return fedspine_pb2.FedspineTask(
            structure=bytes.fromhex(pruning.structure),
            sparsity_before=pruning.sparsity_before,
            sparsity_after=pruning.sparsity_after,
            events=max(1, training.steps // method.prune_every),
            tau=method.prune_every,
            gathering_steps=method.prune_every,
            importance_decay=method.importance_decay,
            rank=pruning.rank,
            scale=loraranks.scale(spec),
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
            probe_rows=method.probe_rows,
            importance=tells,
            # Whoever cuts nothing has no use for it.
            fleet_importance=facts.importance if pruning.sparsity_after > pruning.sparsity_before else "",
        )

    def fold(self, spec: JobSpec, number: int) -> LoraFold:
        return LoraFold("exact", spec.lora.rank, loraranks.scale(spec), number, narrower=True)

    def kinds(self, spec: JobSpec) -> frozenset[UpdateKind]:
        return frozenset({"delta"})

    def initial(self, spec: JobSpec, path: Path) -> Initial:
        raise NotImplementedError("the model host makes this method's first state")


METHOD = Fedspine()
