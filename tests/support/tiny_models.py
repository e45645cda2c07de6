"""Tiny language models made from configurations, with a small real tokenizer: each takes well under a second to make."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers import logging as transformers_logging

LABELS = ("red", "green", "blue")

INITIAL_SPREAD = 0.2
"""Ten times the usual: random features that differ enough for an adapter to learn from in a few steps."""

SENTENCES = (
    "the red lamp is warm", "a green door stands open", "the blue sea is calm", "turn the lamp on", "close the door now",
    "the sea is far from here", "what is the colour of the lamp", "is the door green or red", "warm water in the blue cup",
    "user : assistant : system :", "say it again please", "count one two three four five six seven eight nine ten",
)  # fmt: skip

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]


def tiny_classifier(folder: Path, layers: int = 2) -> Path:
    """A BERT body without a classification head, hidden size 32."""
    torch.manual_seed(1)
    tokenizer = _tokenizer(pair_of_sentences=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=INITIAL_SPREAD,
    )
    return _save(folder, BertModel(config), tokenizer)


def tiny_llama(folder: Path) -> Path:
    """A LLaMA causal language model, hidden size 32, two layers."""
    torch.manual_seed(2)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=INITIAL_SPREAD,
    )
    return _save(folder, LlamaForCausalLM(config), tokenizer)


def tiny_gpt2(folder: Path) -> Path:
    """A GPT-2 causal language model, whose layers are Conv1D and whose tokenizer has no padding token."""
    torch.manual_seed(3)
    tokenizer = _tokenizer(padding=False)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=INITIAL_SPREAD,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(folder, GPT2LMHeadModel(config), tokenizer)


def tiny_t5(folder: Path) -> Path:
    """A T5 sequence-to-sequence model, model size 32, two layers a side."""
    torch.manual_seed(4)
    tokenizer = _tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.decoder_start_token_id = tokenizer.pad_token_id
    return _save(folder, T5ForConditionalGeneration(config), tokenizer)


def coloured_rows(count: int = 24) -> list[dict[str, object]]:
    """Rows a tiny classifier can learn: the label is the colour that the text names."""
    things = ("lamp", "door", "sea", "cup", "water")
    return [
        {"text": f"the {LABELS[index % 3]} {things[index % 5]} is {'warm' if index % 2 else 'calm'}", "label": LABELS[index % 3]}
        for index in range(count)
    ]


def question_rows(count: int = 24) -> list[dict[str, object]]:
    """Rows with input and target for language models."""
    return [
        {"input": f"what is the colour of the {thing}", "target": f"the {thing} is {LABELS[index % 3]}"}
        for index, thing in ((index, ("lamp", "door", "sea")[index % 3]) for index in range(count))
    ]


def chat_rows(count: int = 24) -> list[dict[str, object]]:
    """Chats of a question and an answer each."""
    return [
        {"messages": [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["target"]}]}
        for row in question_rows(count)
    ]


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    """One JSON object a line."""
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path


def _tokenizer(pair_of_sentences: bool = False, padding: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(SENTENCES, trainer)
    if pair_of_sentences:
        sep, cls = (_SPECIAL.index(token) for token in ("[SEP]", "[CLS]"))
        inner.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[EOS]"}
    if padding:
        names["pad_token"] = "[PAD]"
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=inner, model_max_length=128, model_input_names=_inputs(pair_of_sentences), **names
    )


def _inputs(pair_of_sentences: bool) -> list[str]:
    return ["input_ids", "token_type_ids", "attention_mask"] if pair_of_sentences else ["input_ids", "attention_mask"]


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' logging is untyped
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_roberta(folder: Path) -> Path:
    """A RoBERTa body, whose classification head has a layer that is named like layers of the body."""
    torch.manual_seed(5)
    tokenizer = _tokenizer(pair_of_sentences=True)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, RobertaForMaskedLM(config), tokenizer)
