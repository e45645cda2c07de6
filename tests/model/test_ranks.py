"""A model at a lower rank for a while: what it computes then, and that it is whole again afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fleetune.errors import ModelError
from fleetune.model import lora, ranks
from support.adapted import adapted
from support.jobs import recipe_message

CASES = {
    "bert": ("text-classification", ["query", "word_embeddings"]),
    "llama": ("causal-lm", ["q_proj"]),
    "gpt2": ("causal-lm", ["c_attn"]),
}


def shaken(base: Path, name: str) -> lora.AdaptedModel:
    """A fresh adapter does nothing, as its B are zero."""
    task, targets = CASES[name]
    model = adapted(base, recipe_message(task, targets))
    torch.manual_seed(9)
    with torch.no_grad():
        for trainable in model.trainables:
            trainable.parameter.copy_(torch.randn_like(trainable.parameter) * 0.3)
    return model


def logits(model: lora.AdaptedModel) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found: torch.Tensor = model.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def is_right(name: str) -> bool:
    return "lora_A" in name or "lora_embedding_A" in name


@pytest.mark.parametrize("name", CASES)
def test_it_computes_with_the_first_directions_alone(name: str, request: pytest.FixtureRequest) -> None:
    model = shaken(request.getfixturevalue(name), name)
    whole = logits(model)
    with ranks.narrowed(model, 3, 0.7) as narrow:
        assert {t.parameter.shape[0] for t in narrow.trainables if is_right(t.name)} == {3}
        assert [t.name for t in narrow.trainables] == [t.name for t in model.trainables]
        cut = logits(narrow)
    assert torch.allclose(logits(model), whole)
    with torch.no_grad():
        for trainable in model.trainables:  # the same by hand: what lies past the rank is zero
            if is_right(trainable.name):
                trainable.parameter[3:] = 0
    assert not torch.allclose(cut, whole, atol=1e-3)
    assert torch.allclose(logits(model), cut, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_lies_past_the_rank_may_be_a_part_of_the_weights_for_a_while(name: str, request: pytest.FixtureRequest) -> None:
    model = shaken(request.getfixturevalue(name), name)
    frozen = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
    whole = logits(model)
    with ranks.narrowed(model, 3, 0.7, keeps_rest=True) as narrow:
        assert {t.parameter.shape[0] for t in narrow.trainables if is_right(t.name)} == {3}
        assert torch.allclose(logits(narrow), whole, atol=1e-4)
        moved = [parameter for parameter in narrow.model.parameters() if parameter.requires_grad]
        assert {id(parameter) for parameter in moved} == {id(parameter) for parameter in narrow.parameters}
        with torch.no_grad():
            for trainable in narrow.trainables:
                if "lora" in trainable.name:
                    trainable.parameter.mul_(0.5)
        assert not torch.allclose(logits(narrow), whole, atol=1e-3)
    found = model.model.state_dict()
    assert found.keys() == frozen.keys() and all(torch.equal(tensor, frozen[key]) for key, tensor in found.items())
    assert torch.allclose(logits(model), whole)


def test_weights_that_are_tied_stay_tied_and_are_themselves_again(gpt2: Path) -> None:
    model = adapted(gpt2, recipe_message("causal-lm", ["wte"]))
    embedding, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight
    assert embedding.data_ptr() == head.data_ptr()
    layer = next(module for module in model.model.modules() if hasattr(module, "get_base_layer"))
    before = layer.get_base_layer().weight
    with ranks.narrowed(model, 2, keeps_rest=True):
        assert layer.get_base_layer().weight is not before
        assert model.model.get_output_embeddings().weight is head
    assert layer.get_base_layer().weight is before


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_matrix_that_is_held_is_no_trainable_and_has_no_gradient(bert: Path, side: ranks.Side) -> None:
    model = shaken(bert, "bert")
    with ranks.narrowed(model, trains=side) as narrow:
        pairs = {t.name for t in narrow.trainables if "lora" in t.name}
        assert pairs and all(is_right(name) == (side == "right") for name in pairs)
        assert {t.name for t in model.trainables if "lora" not in t.name} <= {t.name for t in narrow.trainables}
        ids = torch.tensor([[5, 6, 7, 8]])
        narrow.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([1])).loss.backward()
        assert all(t.parameter.grad is not None for t in narrow.trainables)
    assert all(t.parameter.requires_grad and t.parameter.grad is None for t in model.trainables if "lora" in t.name)


def test_it_is_whole_again_after_an_error(bert: Path) -> None:
    model = shaken(bert, "bert")
    whole = logits(model)
    with pytest.raises(RuntimeError, match="lost"), ranks.narrowed(model, 1):
        raise RuntimeError("lost")
    assert torch.equal(logits(model), whole)


def test_without_a_rank_of_its_own_it_is_the_model_itself(bert: Path) -> None:
    model = shaken(bert, "bert")
    for rank, scale in ((0, 0.0), (4, 2.0), (4, 0.0)):
        with ranks.narrowed(model, rank, scale) as same:
            assert same is model


def test_a_rank_above_the_model_s_is_refused(bert: Path) -> None:
    with pytest.raises(ModelError, match="rank 5 is asked for"), ranks.narrowed(shaken(bert, "bert"), 5):
        pass
