"""Method `fedavg_lora`: FedAvg of LoRA pairs and head, with FedProx on the device and server optimisers here.

Papers: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg); Li et al. 2020,
"Federated Optimization in Heterogeneous Networks" (FedProx); Hsu et al. 2019 (FedAvgM); Reddi et al. 2021, "Adaptive Federated
Optimization" (FedAdam, FedYogi).
Idea: every device takes some optimiser steps from the same global adapter on its own rows and sends the difference; the
coordinator adds the mean of the differences, weighted by the rows each device saw. With a server optimiser the mean is taken as a
gradient instead.

    symbol     name in code
    n_k        UpdateReport.samples         rows seen by device k in the round: its weight
    E          training.epochs / steps      local work of a round
    B, eta     batch_size, learning_rate
    mu         method.proximal_mu           FedProx's pull to the global adapter
    eta_g      method.server_learning_rate
    beta, beta1, beta2, tau   method.server_momentum, server_beta1, server_beta2, server_tau
    r_i        method.ranks                 rank of device i, by its name
    s          lora.alpha / lora.rank       scale of every device, whatever its rank

How the pairs of many devices become one is `method.aggregation`; lora/rules.py has the rules. By default, with equal ranks, A and B are
averaged each by itself, as FedIT does; the product of the means is not the mean of the products, and how far it is from it is told.

Siblings: proto/fleetune/methods/v1/fedavg_lora.proto, agent/fleetune/agent/methods/fedavg_lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from fleetune.coordinator import loraranks
from fleetune.coordinator.domain import UpdateKind
from fleetune.coordinator.jobsections import WITH_REST, JobSpec
from fleetune.coordinator.lora import rules
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods.base import Initial, RoundFacts
from fleetune.coordinator.rounds.optimizers import FedAdam, FedAvgM, FedYogi, ServerOptimizer
from fleetune.methods.v1 import fedavg_lora_pb2


class FedavgLora:
    name = "fedavg_lora"
    needs_model = True
    plans = False
    prunes = False

    def assign(self, spec: JobSpec, facts: RoundFacts) -> Mapping[str, Message]:
        training = spec.training
        task = fedavg_lora_pb2.FedavgLoraTask(
            steps=training.steps,
            epochs=training.epochs,
            batch_size=training.batch_size,
            gradient_accumulation=training.gradient_accumulation,
            learning_rate=training.learning_rate,
            schedule=training.schedule,
            warmup_steps=training.warmup_steps,
            # By steps every device is at the same place of the schedule; by epochs the device places itself with its own row count.
            schedule_offset=(facts.number - 1) * training.steps,
            schedule_total=spec.rounds.count * training.steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            proximal_mu=spec.method.proximal_mu,
            update_dtype=spec.method.update_dtype,
            round=facts.number,
            rounds=spec.rounds.count,
        )
        aggregation = spec.method.aggregation
        assert aggregation is not None, "jobspec.parse fills it in"
        if aggregation == "fedsa":
            task.personal = True
        elif aggregation in WITH_REST:
            task.trains = "beside-rest"
        elif (trained := rules.trained(aggregation, facts.number)) != "both":
            task.trains = trained
        return {device: _ranked(task, spec, facts.names.get(device, "")) for device in facts.devices}

    def fold(self, spec: JobSpec, number: int) -> ServerOptimizer | LoraFold | None:
        method = spec.method
        if method.aggregation == "fedsa":
            return None  # of A, which is all that there is
        if method.server_optimizer == "none":
            assert method.aggregation is not None, "jobspec.parse fills it in"
            rank, rest = loraranks.state_rank(spec), loraranks.residual_rank(spec)
            return LoraFold(method.aggregation, rank, loraranks.scale(spec), number, bool(method.ranks or rest), rest, spec.seed)
        rate, beta2 = method.server_learning_rate, method.server_beta2
        assert rate is not None and beta2 is not None, "jobspec.parse fills them in"
        match method.server_optimizer:
            case "fedavgm":
                return FedAvgM(rate, method.server_momentum)
            case "fedadam":
                return FedAdam(rate, method.server_beta1, beta2, method.server_tau)
            case "fedyogi":
                return FedYogi(rate, method.server_beta1, beta2, method.server_tau)

    def kinds(self, spec: JobSpec) -> frozenset[UpdateKind]:
        return frozenset({"delta"})

    def initial(self, spec: JobSpec, path: Path) -> Initial:
        raise NotImplementedError("the model host makes this method's first state")


def _ranked(task: fedavg_lora_pb2.FedavgLoraTask, spec: JobSpec, device_name: str) -> fedavg_lora_pb2.FedavgLoraTask:
    """The task of a device by its rank; the plain one where that is the state's."""
    rank = loraranks.rank_of(spec, device_name)
    if rank == loraranks.state_rank(spec):
        return task
    own = fedavg_lora_pb2.FedavgLoraTask()
    own.CopyFrom(task)
    own.rank, own.scale = rank, loraranks.scale(spec)
    return own


METHOD = FedavgLora()
