"""Method `deft`: devices train different blocks of one model at the same time, as each round's plan says.

Paper: Wu, Chen, Huang 2024, "Resource Management for Low-latency Cooperative Fine-tuning of Foundation Models at the Network Edge"
(LoLa-DEFT, arXiv:2407.09873), reconstructed from its abstract; who trains what, and with which part of the uplink, is decided in `planner`.
AdamW: Loshchilov and Hutter 2019. What is ours and what is the paper's stands in docs/methods.md.
Idea: a device that trains only a block propagates back no further than that block, which takes less time and much less memory the
nearer the block is to the loss. Devices send their blocks' gradients; the coordinator puts them together, takes the mean of those who
trained the same tensor, clips the norm of all of it and takes one step of AdamW, whose moments it keeps. A block that nobody has sent
keeps its weights, its moments and its count of steps.

    symbol     name in code
    l          depths                       counted from the loss, 1 next to it
    B          batch_size x gradient_accumulation   rows of one device's gradient
    eta        training.learning_rate, by training.schedule over rounds
    beta1, beta2, epsilon    method.server_beta1, server_beta2, server_epsilon
    lambda     training.weight_decay

With `payload = "deltas"` a device takes some AdamW steps of its own on its blocks and sends how they moved; the coordinator adds the mean.

Siblings: proto/fleetune/methods/v1/deft.proto, agent/fleetune/agent/methods/deft.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from google.protobuf.message import Message

from fleetune import schedule
from fleetune.coordinator.domain import UpdateKind
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.methods.base import Initial, RoundFacts
from fleetune.coordinator.rounds.optimizers import AdamW
from fleetune.methods.v1 import deft_pb2


class Deft:
    name = "deft"
    needs_model = True
    plans = True
    prunes = False

    def assign(self, spec: JobSpec, facts: RoundFacts) -> Mapping[str, Message]:
        """A task for every device that the plan has a part for; before there is a plan, what each device is to measure."""
        if facts.plan is None:
            # Everything, unless each device trains a block alone: that takes less, and memory must not be promised that is not there.
            alone = spec.method.layout == "blocks" and spec.method.layers_per_block == 1
            measured = [] if alone else list(range(1, facts.depth_count + 1))
            return {device: self._task(spec, facts, measured) for device in facts.devices}
        return {part.device_id: self._task(spec, facts, part.depths) for part in facts.plan.parts}

    def _task(self, spec: JobSpec, facts: RoundFacts, depths: Iterable[int]) -> Message:
        training = spec.training
        gradients = spec.method.payload == "gradients"
        return deft_pb2.DeftTask(
            depths=sorted(depths),
            depth_count=facts.depth_count,
            payload=deft_pb2.DEFT_PAYLOAD_GRADIENT if gradients else deft_pb2.DEFT_PAYLOAD_DELTA,
            batch_size=training.batch_size,
            gradient_accumulation=training.gradient_accumulation,
            steps=training.steps,
            learning_rate=0.0 if gradients else self._rate(spec, facts.number),
            weight_decay=0.0 if gradients else training.weight_decay,
            max_grad_norm=0.0 if gradients else training.max_grad_norm,
            update_dtype=spec.method.update_dtype,
            first_step=(facts.number - 1) * training.steps,
            order_seed=spec.seed,
        )

    def fold(self, spec: JobSpec, number: int) -> AdamW | None:
        if spec.method.payload == "deltas":
            return None
        beta2 = spec.method.server_beta2
        assert beta2 is not None, "jobspec.parse fills it in"
        return AdamW(
            learning_rate=self._rate(spec, number),
            beta1=spec.method.server_beta1,
            beta2=beta2,
            epsilon=spec.method.server_epsilon,
            weight_decay=spec.training.weight_decay,
            max_grad_norm=spec.training.max_grad_norm,
        )

    def kinds(self, spec: JobSpec) -> frozenset[UpdateKind]:
        return frozenset({"gradient" if spec.method.payload == "gradients" else "delta"})

    def initial(self, spec: JobSpec, path: Path) -> Initial:
        raise NotImplementedError("the model host makes this method's first state")

    @staticmethod
    def _rate(spec: JobSpec, number: int) -> float:
        """The rate at the beginning of round `number`; a round's local steps all take this one, since the task has room for one."""
        training = spec.training
        return schedule.learning_rate(
            0,
            peak=training.learning_rate,
            name=training.schedule,
            warmup_steps=training.warmup_steps,
            total_steps=spec.rounds.count * training.steps,
            offset=(number - 1) * training.steps,
        )


METHOD = Deft()
