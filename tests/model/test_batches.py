"""Tokens, masks, padding and order."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fleetune.errors import DataError
from fleetune.model import batches, recipe
from fleetune.model.bases import Tokenizer
from fleetune.model.batches import IGNORED, Example
from fleetune.model.rows import Row
from support.jobs import recipe_message

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def tokenizer(llama: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(llama)


def _one(row: Row, tokenizer: Tokenizer, **changes: object) -> Example:
    message = recipe_message("causal-lm", **changes)  # type: ignore[arg-type]  # fields of the recipe
    return batches.encode([row], recipe.from_proto(message), tokenizer).items[0]


def _learned(example: Example, tokenizer: Tokenizer) -> str:
    assert example.labels is not None
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def test_loss_falls_on_the_target_only_when_the_prompt_is_masked(tokenizer: Tokenizer) -> None:
    row = Row("what is the colour", "the lamp is red")
    masked = _one(row, tokenizer, mask_prompt=True)
    assert _learned(masked, tokenizer) == "the lamp is red[EOS]"
    assert tokenizer.decode(masked.ids.tolist()) == "what is the colourthe lamp is red[EOS]"
    assert _learned(_one(row, tokenizer), tokenizer) == "what is the colourthe lamp is red[EOS]"


def test_left_truncation_keeps_the_target_and_right_truncation_the_prompt(tokenizer: Tokenizer) -> None:
    row = Row("what is the colour of the lamp", "the lamp is red")
    left = _one(row, tokenizer, mask_prompt=True, max_length=6, truncation="left")
    assert len(left.ids) == 6
    assert _learned(left, tokenizer) == "the lamp is red[EOS]"
    with pytest.raises(DataError, match="has a token to learn within max_length 4"):
        _one(row, tokenizer, mask_prompt=True, max_length=4, truncation="right")


def test_rows_with_nothing_left_to_learn_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    rows = [Row("the lamp", "red"), Row("what is the colour of the lamp of the door of the sea", "red")]
    found = batches.encode(rows, recipe.from_proto(recipe_message("causal-lm", mask_prompt=True, max_length=8)), tokenizer)
    assert (len(found), found.dropped) == (1, 1)


def test_a_plain_text_is_learned_with_its_end(tokenizer: Tokenizer) -> None:
    example = _one(Row("the lamp is red"), tokenizer, columns={"text": "text"})
    assert _learned(example, tokenizer) == "the lamp is red[EOS]"
    assert example.loss_terms == len(example.ids) - 1


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_chat_is_learned_where_the_assistant_speaks(tokenizer: Tokenizer, template: str | None) -> None:
    tokenizer.chat_template = template
    turns = (("system", "be calm"), ("user", "the colour"), ("assistant", "red"), ("user", "is it"), ("assistant", "the lamp"))
    example = _one(Row(messages=turns), tokenizer, mask_prompt=True, columns={"chat": "messages"}, max_length=200)
    end = "[EOS]" if template is None else "</s>"
    # Byte-level tokens hold the space before their word.
    assert _learned(example, tokenizer).replace(f"{end} ", end).strip() == f"red{end}the lamp{end}"
    whole = _one(Row(messages=turns), tokenizer, columns={"chat": "messages"}, max_length=200)
    assert _learned(whole, tokenizer).count("is it") == 1


def test_a_template_that_refuses_a_chat_is_a_data_error(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(DataError, match="refuses a chat of the roles system, assistant: no system turns"):
        _one(Row(messages=(("system", "a"), ("assistant", "b"))), tokenizer, columns={"chat": "messages"})


def test_a_target_ends_with_the_end_unless_it_was_cut(t5: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(t5)
    message = recipe_message("seq2seq-lm", ["q"], max_target_length=4)
    short, long = batches.encode(
        [Row("the sea", "is blue"), Row("the sea", "is calm is calm is calm")], recipe.from_proto(message), tokenizer
    ).items
    assert short.labels is not None
    assert long.labels is not None
    assert short.labels[-1] == tokenizer.eos_token_id
    assert len(long.labels) == 4
    assert long.labels[-1] != tokenizer.eos_token_id


def test_pairs_keep_their_types(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    message = recipe_message(columns={"text": "a", "text_pair": "b", "label": "label"})
    pair = batches.encode([Row("the lamp", "the door", 1)], recipe.from_proto(message), tokenizer).items[0]
    assert pair.types is not None
    assert pair.types.tolist() == [0] * 4 + [1] * 3
    batch = batches.collate([pair], 0, torch.device("cpu"))
    assert batch["token_type_ids"].tolist() == [pair.types.tolist()]


def test_a_batch_is_as_long_as_its_longest_row(tokenizer: Tokenizer) -> None:
    message = recipe_message("causal-lm", mask_prompt=True)
    items = batches.encode([Row("the", "red"), Row("the warm lamp", "is red")], recipe.from_proto(message), tokenizer).items
    batch = batches.collate(items, 0, torch.device("cpu"))
    longest = max(len(item.ids) for item in items)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, longest)
    )
    padded = longest - len(items[0].ids)
    assert batch["attention_mask"][0].tolist() == [1] * len(items[0].ids) + [0] * padded
    assert batch["labels"][0].tolist()[-padded:] == [IGNORED] * padded


def test_every_pass_sees_every_row_once_in_an_order_of_its_own() -> None:
    order = list(islice(batches.endless_order(10, "seed"), 30))
    passes = [order[:10], order[10:20], order[20:]]
    assert all(Counter(found) == Counter(range(10)) for found in passes)
    assert passes[0] != passes[1] != passes[2]
    assert order == list(islice(batches.endless_order(10, "seed"), 30))


def test_a_sample_is_the_same_every_time() -> None:
    assert batches.sample(100, 5, "s") == batches.sample(100, 5, "s")
    assert batches.sample(3, 5, "s") == batches.sample(3, 0, "s") == [0, 1, 2]
