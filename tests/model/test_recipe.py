"""Recipes as frozen facts, their defaults, and which are refused."""

from __future__ import annotations

import pytest

from fleetune.errors import FleetuneError
from fleetune.model import recipe
from support.jobs import recipe_message


def test_what_is_unset_gets_its_default() -> None:
    message = recipe_message(max_length=0, truncation="", dtype="", columns={})
    found = recipe.from_proto(message)
    assert (found.data.max_length_tokens, found.data.truncation_side, found.dtype) == (128, "right", "auto")
    assert found.data.columns == recipe.Columns(text="text", label="label")


def test_a_target_may_be_as_long_as_an_input_unless_said_otherwise() -> None:
    assert recipe.from_proto(recipe_message("seq2seq-lm", ["q"], max_length=40)).data.max_target_length_tokens == 40


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"labels": ["one"]}, "at least two different labels"),
        ({"labels": ["one", "one"]}, "at least two different labels"),
        ({"rank": 0}, "rank 0"),
        ({"dropout": 1.0}, "dropout 1"),
        ({"dtype": "int8"}, "'int8' is not known; allowed: auto, float32"),
        ({"truncation": "middle"}, "'middle' is not known; allowed: right, left"),
    ],
)
def test_unusable_values_are_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(FleetuneError, match=complaint):
        recipe.from_proto(recipe_message(**changes))  # type: ignore[arg-type]  # values of the case


def test_a_task_of_a_newer_protocol_is_unsupported() -> None:
    message = recipe_message()
    message.model_task = 99  # type: ignore[assignment]  # what an older reader sees of a newer enum
    with pytest.raises(FleetuneError, match="99"):
        recipe.from_proto(message)
