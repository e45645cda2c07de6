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

A and B of a LoRA pair are averaged each by itself, as FedIT does; the product of the means is not the mean of the products.

Siblings: proto/fleetune/methods/v1/fedavg_lora.proto, agent/fleetune/agent/methods/fedavg_lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from fleetune.coordinator.domain import UpdateKind
from fleetune.coordinator.jobsections import JobSpec
from fleetune.coordinator.methods.base import Initial, RoundFacts
from fleetune.coordinator.rounds.optimizers import FedAdam, FedAvgM, FedYogi, ServerOptimizer
from fleetune.methods.v1 import fedavg_lora_pb2


class FedavgLora:
    name = "fedavg_lora"
    needs_model = True
    plans = False

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
        return dict.fromkeys(facts.devices, task)

    def fold(self, spec: JobSpec, number: int) -> ServerOptimizer | None:
        method = spec.method
        if method.server_optimizer == "none":
            return None
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


METHOD = FedavgLora()
