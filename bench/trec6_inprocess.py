"""Federated averaging of MiniLM on TREC-6 in one process: what the service must reach, without any service.

    .venv/bin/python bench/trec6_inprocess.py --data FOLDER [--alpha 0.5] [--seeds 1]

FOLDER holds train.jsonl and test.jsonl with the columns text and label. Prints test accuracy per round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from minilm import minilm_folder

from fleetune import schedule
from fleetune.agent.methods.fedavg_lora import write_delta
from fleetune.agent.trainer import loop
from fleetune.model import accelerator as accelerators
from fleetune.model import adapter, batches, evaluation, lora, recipe, rows
from fleetune.wire import codec

LABELS = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
RECIPE = recipe.Recipe(
    model_task=recipe.CLASSIFICATION,
    labels=LABELS,
    lora=recipe.Lora(rank=8, alpha=16.0, dropout=0.0, targets=("query", "value")),
    data=recipe.DataContract("trec6", recipe.Columns(text="text", label="label"), 64, 64, "right", False),
    dtype="float32",
    gradient_checkpointing=False,
    evaluation_rows=0,
    metric="accuracy",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--alpha", type=float, default=0.0, help="Dirichlet concentration of the split; 0 is IID")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 is all cores; 1 is faster on a busy machine")
    options = parser.parse_args()
    finals = [run(options, seed) for seed in range(options.seeds)]
    print(f"test accuracy of the last round, median of {options.seeds} seeds: {float(np.median(finals)):.4f}")


def run(options: argparse.Namespace, seed: int) -> float:
    accelerators.set_threads(options.threads)
    adapted = lora.load(minilm_folder(), RECIPE, accelerators.pick("auto"), seed=seed)
    train = rows.read(options.data / "train.jsonl", None, RECIPE)
    test = batches.encode(rows.read(options.data / "test.jsonl", None, RECIPE), RECIPE, adapted.tokenizer)
    parts = split(np.array([row.label for row in train]), options.devices, options.alpha, np.random.default_rng(seed))
    devices = [batches.encode([train[index] for index in part], RECIPE, adapted.tokenizer) for part in parts]
    print(f"seed {seed}: rows per device {[len(device) for device in devices]}", flush=True)
    accuracy = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, options.rounds + 1):
            run_round(adapted, devices, options, seed, number, Path(folder))
            measured = evaluation.evaluate(adapted, test.items)
            accuracy = measured.metrics["accuracy"]
            print(f"seed {seed} round {number}: accuracy {accuracy:.4f} loss {measured.metrics['loss']:.4f}", flush=True)
    return accuracy


def run_round(
    adapted: lora.AdaptedModel, devices: Sequence[batches.Examples], options: argparse.Namespace, seed: int, number: int, folder: Path
) -> None:
    """Every device trains from the same state; the model then holds the mean, weighted by samples."""
    start = [parameter.detach().clone() for parameter in adapted.parameters]
    rate = partial(schedule.learning_rate, peak=2e-3, name="constant", warmup_steps=0, total_steps=1, offset=0)
    total: dict[str, torch.Tensor] = {}
    weights = 0
    for index, device in enumerate(devices):
        for parameter, anchor in zip(adapted.parameters, start, strict=True):
            parameter.data.copy_(anchor)
        plan = loop.Plan(options.steps * 32, 32, 32, rate, 0.01, 1.0, 0.0, f"{seed}/{number}/{index}", None)
        outcome = loop.train(adapted, device.items, plan, lambda event, **fields: None)
        path = folder / "update"
        write_delta(path, adapted, start, "float32")
        for name, delta in adapter.read_tensors(path, codec.read_table(path)).items():
            total[name] = total.get(name, torch.zeros_like(delta, dtype=torch.float64)) + outcome.samples * delta.double()
        weights += outcome.samples
    for trainable, anchor in zip(adapted.trainables, start, strict=True):
        trainable.parameter.data.copy_(anchor + (total[trainable.name] / weights).float().to(anchor.device))


def split(labels: np.ndarray, devices: int, alpha: float, rng: np.random.Generator) -> list[list[int]]:
    """Row numbers per device: IID, or each label by shares drawn from Dirichlet(alpha)."""
    parts: list[list[int]] = [[] for _ in range(devices)]
    if alpha <= 0:
        for position, row in enumerate(rng.permutation(len(labels))):
            parts[position % devices].append(int(row))
        return parts
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet([alpha] * devices))[:-1] * len(members)).astype(int)
        for part, some in zip(parts, np.split(members, cuts), strict=True):
            part.extend(int(row) for row in some)
    return parts


if __name__ == "__main__":
    main()
