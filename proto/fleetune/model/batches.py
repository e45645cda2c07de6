"""From rows to padded tensors: tokens, masked labels, seeded order.

A chat is rendered with the tokenizer's own template; a tokenizer without one gets the plain fallback

    role: content LF

for each turn, where the assistant's content ends with the tokenizer's end-of-sequence token. Loss falls on what the assistant
says (content and whatever closes the turn) when `mask_prompt` is set, else on every token.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fleetune.errors import DataError, UnsupportedError
from fleetune.model.bases import Tokenizer
from fleetune.model.recipe import CLASSIFICATION, SEQ2SEQ_LM, Recipe
from fleetune.model.rows import Message, Row

IGNORED = -100
"""Label of a token that carries no loss; what torch's cross entropy skips."""

_TOKENIZED_AT_ONCE_ROWS = 512

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """One tokenised row. Arrays of C integers: a list of Python integers takes nine times the memory.

    `loss_terms` is how many terms the row adds to the loss: 1 for a class, the unmasked target tokens otherwise.
    """

    ids: array[int]
    types: array[int] | None
    labels: array[int] | None
    label: int
    loss_terms: int


@dataclass(frozen=True)
class Examples:
    """Tokenised rows; `dropped` counts rows of which truncation left nothing to learn."""

    items: tuple[Example, ...]
    dropped: int

    def __len__(self) -> int:
        return len(self.items)


def encode(rows: Sequence[Row], recipe: Recipe, tokenizer: Tokenizer, on_progress: Callable[[int, int], None] | None = None) -> Examples:
    """Tokenises every row once. Raises DataError when truncation leaves nothing to learn from any of them."""
    tokenizer.truncation_side = recipe.data.truncation_side
    tokenizer.padding_side = "right"
    items: list[Example] = []
    for begin in range(0, len(rows), _TOKENIZED_AT_ONCE_ROWS):
        items += _encode_some(rows[begin : begin + _TOKENIZED_AT_ONCE_ROWS], recipe, tokenizer)
        if on_progress is not None:
            on_progress(min(begin + _TOKENIZED_AT_ONCE_ROWS, len(rows)), len(rows))
    kept = tuple(item for item in items if item.loss_terms > 0)
    if not kept:
        raise DataError(
            f"None of the {len(rows)} rows of the data {recipe.data.name!r} has a token to learn within "
            f"max_length {recipe.data.max_length_tokens}.",
            'Raise `max_length` in the job, or set `truncation = "left"` so that the target is kept.',
        )
    return Examples(kept, len(items) - len(kept))


def _encode_some(rows: Sequence[Row], recipe: Recipe, tokenizer: Tokenizer) -> list[Example]:
    if recipe.model_task == CLASSIFICATION:
        return _classes(rows, recipe, tokenizer)
    if recipe.model_task == SEQ2SEQ_LM:
        return _targets(rows, recipe, tokenizer)
    return [_continuation(row, recipe, tokenizer) for row in rows]


def _classes(rows: Sequence[Row], recipe: Recipe, tokenizer: Tokenizer) -> list[Example]:
    pairs = [row.second or "" for row in rows] if rows[0].second is not None else None
    encoded = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=recipe.data.max_length_tokens)
    types = encoded.get("token_type_ids") or [None] * len(rows)
    return [
        # Models take absent types for zeros.
        Example(array("i", ids), array("b", kinds) if kinds and any(kinds) else None, None, row.label, 1)
        for row, ids, kinds in zip(rows, encoded["input_ids"], types, strict=True)
    ]


def _targets(rows: Sequence[Row], recipe: Recipe, tokenizer: Tokenizer) -> list[Example]:
    inputs = tokenizer([row.text for row in rows], truncation=True, max_length=recipe.data.max_length_tokens)["input_ids"]
    targets = tokenizer(text_target=[row.second or "" for row in rows], truncation=True, max_length=recipe.data.max_target_length_tokens)[
        "input_ids"
    ]
    examples: list[Example] = []
    for ids, target in zip(inputs, targets, strict=True):
        labels = array("i", _with_end(target, tokenizer, recipe.data.max_target_length_tokens))
        examples.append(Example(array("i", ids), None, labels, -1, len(labels)))
    return examples


def _with_end(ids: Sequence[int], tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """Models stop where they learned to: a target that was not cut ends with the end-of-sequence token."""
    end = tokenizer.eos_token_id
    if end is None or (ids and ids[-1] == end) or len(ids) >= max_tokens:
        return list(ids)
    return [*ids, end]


def _continuation(row: Row, recipe: Recipe, tokenizer: Tokenizer) -> Example:
    if row.messages:
        ids, learned = _chat(row.messages, tokenizer)
    else:
        ids, learned = _prompted(row, tokenizer)
    if not recipe.data.mask_prompt:
        learned = [True] * len(ids)
    limit = recipe.data.max_length_tokens
    kept = slice(0, limit) if recipe.data.truncation_side == "right" else slice(max(0, len(ids) - limit), None)
    ids, learned = ids[kept], learned[kept]
    labels = array("i", (token if wanted else IGNORED for token, wanted in zip(ids, learned, strict=True)))
    # A causal model predicts each token from those before it, so the first has no loss.
    return Example(array("i", ids), None, labels, -1, sum(label != IGNORED for label in labels[1:]))


def _prompted(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    end = tokenizer.eos_token_id
    first: list[int] = list(tokenizer(row.text)["input_ids"])
    while len(first) > 1 and first[-1] == end:
        first.pop()
    if row.second is None:
        ids = first if end is None else [*first, end]
        return ids, [True] * len(ids)
    second: list[int] = list(tokenizer(row.second, add_special_tokens=False)["input_ids"])
    if end is not None:
        second.append(end)
    return first + second, [False] * len(first) + [True] * len(second)


def _chat(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"The tokenizer {type(tokenizer).__name__} cannot tell where its tokens lie in the text, which chat rows need.",
            "Use a base with a tokenizer.json.",
        )
    text, spans = _templated(messages, tokenizer) if tokenizer.chat_template else _plain(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True)
    # By a token's last character: byte-level tokens begin with the space before their word, which belongs to the prompt.
    learned = [begin < end and any(first < end <= last for first, last in spans) for begin, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), learned


def _plain(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    text = ""
    spans: list[tuple[int, int]] = []
    for role, content in messages:
        said = content + (tokenizer.eos_token or "") if role == "assistant" else content
        text += f"{role}: "
        if role == "assistant":
            spans.append((len(text), len(text) + len(said)))
        text += f"{said}\n"
    return text, spans


def _templated(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    turns = [{"role": role, "content": content} for role, content in messages]
    text = _render(turns, tokenizer, prompt=False)
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            until = _render(turns[: index + 1], tokenizer, prompt=False)
            before = _render(turns[:index], tokenizer, prompt=True) if index else ""
            # Some templates rewrite earlier turns once later ones follow; only what stands in the whole text can be learned.
            begin = _shared_length(before, until)
            end = _shared_length(until, text)
            if end > begin:
                spans.append((begin, end))
    return text, spans


def _shared_length(first: str, second: str) -> int:
    """Characters that both begin with."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def _render(turns: Sequence[dict[str, str]], tokenizer: Tokenizer, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"The base's chat template refuses a chat of the roles {roles}: {error}.", "Order the turns as the template expects."
        ) from error


def collate(items: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """A batch padded to its longest row, as int64 tensors of shape (rows, longest) on `device`."""
    longest = max(len(item.ids) for item in items)
    batch: Batch = {
        "input_ids": torch.tensor([item.ids.tolist() + [pad_id] * (longest - len(item.ids)) for item in items]),
        "attention_mask": torch.tensor([[1] * len(item.ids) + [0] * (longest - len(item.ids)) for item in items]),
    }
    if any(item.types is not None for item in items):
        batch["token_type_ids"] = torch.tensor([_padded(item.types, longest, 0) for item in items])
    if items[0].labels is None:
        batch["labels"] = torch.tensor([item.label for item in items])
    else:
        width = max(len(item.labels or ()) for item in items)
        batch["labels"] = torch.tensor([_padded(item.labels, width, IGNORED) for item in items])
    if device.type == "cpu":
        return batch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _padded(values: array[int] | None, length: int, filler: int) -> list[int]:
    known = values.tolist() if values is not None else []
    return known + [filler] * (length - len(known))


def endless_order(count: int, seed: str, first: int = 0) -> Iterator[int]:
    """Row numbers pass after pass, each pass in an order of its own; the same on every machine for the same seed.

    `first` numbers are left out, as if they had been taken before.
    """
    passed, left_out = divmod(first, count)
    while True:
        order = list(range(count))
        random.Random(f"{seed}/{passed}").shuffle(order)
        yield from order[left_out:]
        passed, left_out = passed + 1, 0


def sample(count: int, wanted: int, seed: str) -> list[int]:
    """`wanted` of `count` row numbers in ascending order (all of them when `wanted` is 0), the same in every round."""
    if wanted <= 0 or wanted >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))
