"""Tiny models of every architecture that can be pruned, and what a model must compute that was not cut but only masked."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
import transformers

from fleetune import architectures, sparsity, structures
from fleetune.architectures import Layout, TensorCut
from fleetune.structures import Keep, Structure

Model = Any  # transformers' and peft's classes are untyped mixtures

WORDS = 60
_ENCODER: Mapping[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
_DECODER: Mapping[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_T5: Mapping[str, Any] = {
    "vocab_size": WORDS, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 6, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
_DISTILBERT: Mapping[str, Any] = {
    "vocab_size": WORDS, "dim": 48, "n_layers": 3, "n_heads": 6, "hidden_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip

MODELS: Mapping[str, Callable[[], Model]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_ENCODER)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_ENCODER, pad_token_id=1)),
    "xlm-roberta": lambda: transformers.XLMRobertaForSequenceClassification(transformers.XLMRobertaConfig(**_ENCODER, pad_token_id=1)),
    "electra": lambda: transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**_ENCODER, embedding_size=24)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**_DISTILBERT)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_DECODER)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**_DECODER, "num_key_value_heads": 2})),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER, head_dim=16)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)),
    "t5-gated": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5, feed_forward_proj="gated-gelu")),
}


def made(name: str, seed: int = 0) -> Model:
    """In evaluation mode, with weights that differ enough for a mistake to show."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def adapted(model: Model, rank: int = 4, targets: tuple[str, ...] = ()) -> Model:
    """A copy with LoRA on all linear layers of the groups (or on `targets`), B not zero, the base frozen."""
    layout = layout_of(model)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets or architectures.target_names(layout)))
    with warnings.catch_warnings():
        # peft asks transformers by a name that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return wrapped.eval()


def layout_of(model: Model) -> Layout:
    return architectures.layout(model.config.to_dict())


def inputs(model: Model, rows: int = 2, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, 9), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "t5":
        found["decoder_input_ids"] = torch.randint(3, WORDS, (rows, 5), generator=generator)
    return found


def logits(model: Model, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


def structure(layout: Layout, share: float, seed: int = 0, uneven: bool = False, now: Structure | None = None) -> Structure:
    """A structure of about this sparsity, chosen at random; with `uneven`, layers keep different numbers."""
    draw = random.Random(seed)
    keeps = list(sparsity.keeps(layout, share))
    if uneven:
        keeps = [
            Keep(max(1, keep.clusters - draw.choice([0, 1])), keep.each)
            if group.kind == "heads"
            else Keep(max(8, keep.clusters - draw.choice([0, 8])), 1)
            for group, keep in zip(layout.groups, keeps, strict=True)
        ]
    scores = [[draw.random() for _ in range(group.units)] for group in layout.groups]
    return structures.choose(layout, structures.whole(layout) if now is None else now, keeps, scores)


@torch.no_grad()
def mask(model: Model, layout: Layout, kept: Structure) -> None:
    """Zeroes the columns by which cut units would be read: the model computes what the cut one should, at full size."""
    for name, module in model.named_modules():
        entry = layout.module_of(name)
        if entry is None or entry[1].axis == 0 or isinstance(module, torch.nn.Embedding) or name.endswith(".base_layer"):
            continue
        group, piece = entry
        base: Any = getattr(module, "base_layer", module)
        gone = torch.ones(base.weight.shape[1], dtype=torch.bool)
        gone[structures.kept_elements(layout, kept, TensorCut(group, piece.axis, piece.width, piece.shared))] = False
        base.weight[:, gone] = 0.0
        for factor in getattr(module, "lora_A", {}).values():
            factor.weight[:, gone] = 0.0
