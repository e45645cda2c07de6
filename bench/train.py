"""What a training step through our loop costs beside the same step in a plain PEFT loop.

    python bench/train.py [--seconds 40] [--steps 4] [--threads 1] [--dtype float32] [--write]

Both loops train the same model on the same rows in the same order; they take turns at going first, so that a busy machine slows both, and
the ratio is the median of the pairs' ratios. Two points: MiniLM (the demo's base) with batches of 16 rows of 64 tokens, and a tiny BERT
in which the arithmetic costs next to nothing, so that the loop itself is what is measured. Each point has --seconds, and five pairs at
least.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import peft
import sections
import torch
from minilm import minilm_folder
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel
from transformers import logging as transformers_logging

from fleetune.agent.trainer import loop
from fleetune.model import accelerator as accelerators
from fleetune.model import batches, lora, recipe
from fleetune.model.batches import Example, Examples
from fleetune.model.rows import Row

LABELS = tuple("abcdef")
RATE = 1e-3
ALLOWED = 1.05
"""What a step may take of a plain one, with MiniLM; a tiny model shows what the loop adds, and no more is asked of it."""

PAIRS_MIN, PAIRS_MAX = 5, 60


@dataclass(frozen=True)
class Point:
    """One thing that is measured."""

    name: str
    base: Path
    batch_rows: int
    tokens: int
    steps: int
    """Times --steps: a tiny model's are over before a clock has seen them."""


@dataclass(frozen=True)
class Measured:
    """Of one point, by "cpu_s" and "wall_s": milliseconds of a step here and there, and the pairs' ratios from least to greatest."""

    point: Point
    own_ms: dict[str, float]
    plain_ms: dict[str, float]
    ratios: dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of one measurement")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the pairs of each point")
    parser.add_argument("--points", nargs="+", choices=["MiniLM", "tiny"], default=["MiniLM", "tiny"])
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 is all cores")
    parser.add_argument("--dtype", choices=recipe.DTYPES, default="float32")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--accelerator", choices=accelerators.CHOICES, default="cpu")
    options = parser.parse_args()
    threads = accelerators.set_threads(options.threads)
    accelerator = accelerators.pick(options.accelerator)
    what = torch.cuda.get_device_name() if accelerator.kind == "cuda" else f"{_cpu()}, {os.cpu_count()} CPUs, {threads} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    versions = f"{what}, Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    print(f"machine: {versions}, load {os.getloadavg()[0]:.1f}")
    command = f"python {' '.join(sys.argv)}"
    print(f"command: {command}", flush=True)
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        points = (Point("MiniLM", minilm_folder(), 16, 64, 1), Point("tiny", _tiny_base(Path(folder), minilm_folder()), 8, 16, 5))
        for point in points:
            if point.name in options.points:
                found.append(_measure(point, options, accelerator))
    text = table(found, options)
    print(text)
    if options.write:
        when = datetime.date.today().isoformat()
        sections.put("train", f"{text}\n\nMeasured on {when} with `{command}` on {versions}, load {os.getloadavg()[0]:.0f}.")
    return int(any(statistics.median(one.ratios["cpu_s"]) > ALLOWED for one in found if one.point.name == "MiniLM"))


def _measure(point: Point, options: argparse.Namespace, accelerator: accelerators.Accelerator) -> Measured:
    found = recipe.Recipe(
        model_task=recipe.CLASSIFICATION,
        labels=LABELS,
        lora=recipe.Lora(rank=8, alpha=16.0, dropout=0.0, targets=("query", "value")),
        data=recipe.DataContract("rows", recipe.Columns(text="text", label="label"), point.tokens, point.tokens, "right", False),
        dtype=options.dtype,
        gradient_checkpointing=False,
        evaluation_rows=0,
        metric="accuracy",
    )
    adapted = lora.load(point.base, found, accelerator, seed=1)
    examples = _examples(adapted, point)
    steps = options.steps * point.steps
    plain = partial(_plain_loop, _plain_model(point, adapted), adapted, examples.items, point, steps)
    own = partial(_our_loop, adapted, examples.items, point, steps)
    _cost(plain, accelerator), _cost(own, accelerator)  # warm up
    pairs: list[tuple[_Cost, _Cost]] = []
    begun_s = time.monotonic()
    while len(pairs) < PAIRS_MIN or (time.monotonic() - begun_s < options.seconds and len(pairs) < PAIRS_MAX):
        order = (own, plain) if len(pairs) % 2 else (plain, own)
        costs = {action: _cost(action, accelerator) for action in order}
        pairs.append((costs[own], costs[plain]))
    measured = Measured(point, {}, {}, {})
    print(f"{point.name}: batches of {point.batch_rows} rows of {point.tokens} tokens, {len(pairs)} pairs of {steps} steps")
    for kind in ("cpu_s", "wall_s"):
        seconds = [(getattr(ours, kind), getattr(other, kind)) for ours, other in pairs]
        ratios = measured.ratios[kind] = sorted(ours / other for ours, other in seconds)
        own_ms, plain_ms = (1e3 * statistics.median(pair[side] for pair in seconds) / steps for side in (0, 1))
        measured.own_ms[kind], measured.plain_ms[kind] = own_ms, plain_ms
        print(
            f"  {kind:6} ours {own_ms:8.2f} ms a step, plain {plain_ms:8.2f} ms; "
            f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
            flush=True,
        )
    return measured


def table(found: Sequence[Measured], options: argparse.Namespace) -> str:
    """The section for docs/benchmarks.md."""
    lines = [
        "## A training step beside a plain PEFT loop",
        "",
        "The trainer's loop (accumulation, clipping, schedules, progress, checks of numbers) and what a person writes who follows PEFT's "
        f"documentation, on the same rows, LoRA r=8 on query and value, {options.dtype}. Medians of pairs that take turns at going first, "
        f"least and greatest in brackets. With MiniLM it is to be {ALLOWED:g} at most; the tiny BERT of two layers and 32 units shows what "
        "the loop itself adds.",
        "",
        "| model, batch | pairs | CPU of a step, ms: here, plain | ratio of CPU | ratio of wall |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in found:
        cells = [f"{one.point.name}, {one.point.batch_rows} x {one.point.tokens}", str(len(one.ratios["cpu_s"]))]
        cells.append(f"{one.own_ms['cpu_s']:.1f}, {one.plain_ms['cpu_s']:.1f}")
        for kind in ("cpu_s", "wall_s"):
            ratios = one.ratios[kind]
            cells.append(f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _our_loop(adapted: lora.AdaptedModel, items: Sequence[Example], point: Point, steps: int) -> None:
    plan = loop.Plan(
        total_rows=steps * point.batch_rows,
        step_rows=point.batch_rows,
        micro_rows=point.batch_rows,
        rate=lambda step: RATE,
        weight_decay=0.01,
        max_grad_norm=1.0,
        proximal_mu=0.0,
        seed="1",
        memory_bytes=None,
    )
    loop.train(adapted, items, plan, lambda event, **fields: None)


def _plain_loop(model: torch.nn.Module, adapted: lora.AdaptedModel, items: Sequence[Example], point: Point, steps: int) -> None:
    """What a person writes who follows PEFT's documentation: pad, forward, backward, clip, step."""
    torch.manual_seed(1)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    rows = [{"input_ids": item.ids.tolist()} for item in items]
    order = batches.endless_order(len(items), "1")
    device = adapted.accelerator.device
    for _ in range(steps):
        chosen = list(islice(order, point.batch_rows))
        batch = dict(adapted.tokenizer.pad([rows[index] for index in chosen], return_tensors="pt"))
        batch["labels"] = torch.tensor([items[index].label for index in chosen])
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cpu":
            loss.item()


def _plain_model(point: Point, adapted: lora.AdaptedModel) -> torch.nn.Module:
    dtype = next(parameter.dtype for parameter in adapted.model.parameters() if not parameter.requires_grad)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    base = AutoModelForSequenceClassification.from_pretrained(point.base, num_labels=len(LABELS), local_files_only=True, dtype=dtype)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model: torch.nn.Module = peft.get_peft_model(base, config)
    return model.to(adapted.accelerator.device)


def _examples(adapted: lora.AdaptedModel, point: Point) -> Examples:
    """Rows of exactly the wished length, so that both loops pad alike."""
    text = "what is the colour of the lamp that stands beside the open door of the house at the sea " * 8
    rows = [Row(f"{word} {text}", None, index % len(LABELS)) for index, word in enumerate(text.split())]
    examples = batches.encode(rows, adapted.recipe, adapted.tokenizer)
    assert {len(item.ids) for item in examples.items} == {point.tokens}
    return examples


def _tiny_base(folder: Path, tokenizer_from: Path) -> Path:
    torch.manual_seed(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' logging is untyped
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=30522)
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    return folder


@dataclass(frozen=True)
class _Cost:
    """Seconds of one measurement; CPU seconds are the steadier figure on a machine that others use."""

    cpu_s: float
    wall_s: float


def _cost(action: Callable[[], None], accelerator: accelerators.Accelerator) -> _Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    if accelerator.kind == "cuda":
        torch.cuda.synchronize()
    return _Cost(time.process_time() - cpu, time.perf_counter() - wall)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
