"""Which tensors are trained, how they are called, in which blocks they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.errors import ModelError
from fleetune.model import bases, lora, recipe
from support.adapted import CPU, adapted
from support.jobs import recipe_message


def _names(model: lora.AdaptedModel) -> list[str]:
    return [trainable.name for trainable in model.trainables]


def test_names_are_those_that_peft_saves(bert: Path) -> None:
    model = adapted(bert, recipe_message())
    assert _names(model) == sorted(peft.get_peft_model_state_dict(model.model, save_embedding_layers=False))
    assert "base_model.model.classifier.weight" in _names(model)


def test_only_the_adapter_is_trained(bert: Path) -> None:
    model = adapted(bert, recipe_message())
    trained = sum(parameter.numel() for parameter in model.model.parameters() if parameter.requires_grad)
    assert model.trainable_count == trained == 2 * 2 * (4 * 32 * 2) + 3 * 32 + 3


def test_the_same_seed_makes_the_same_first_adapter(bert: Path) -> None:
    first, second = adapted(bert, recipe_message(), seed=5), adapted(bert, recipe_message(), seed=5)
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(first.trainables, second.trainables, strict=True))


def test_a_wrong_target_is_named_with_the_names_that_the_model_has(bert: Path) -> None:
    with pytest.raises(ModelError) as caught:
        adapted(bert, recipe_message(targets=["query", "q_proj"]))
    assert "'q_proj'" in str(caught.value)
    assert "'query'" not in str(caught.value)
    assert "dense, key, query, value, position_embeddings" in str(caught.value)


def test_a_target_that_is_no_layer_is_refused(bert: Path) -> None:
    with pytest.raises(ModelError, match="'attention'"):
        adapted(bert, recipe_message(targets=["attention"]))


def test_a_target_may_be_a_longer_ending(bert: Path) -> None:
    names = _names(adapted(bert, recipe_message(targets=["self.query"])))
    assert sum("query.lora_A" in name for name in names) == 2


def test_targets_that_also_match_the_head_leave_it_whole(tmp_path: Path) -> None:
    from support.tiny_models import tiny_roberta

    model = adapted(tiny_roberta(tmp_path / "roberta"), recipe_message(targets=["dense"]))
    assert "base_model.model.classifier.dense.weight" in _names(model)
    assert not any("classifier" in name and "lora" in name for name in _names(model))


def test_no_targets_means_the_usual_ones_of_the_model_type(llama: Path) -> None:
    names = _names(adapted(llama, recipe_message("causal-lm", targets=[])))
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


def test_conv1d_layers_are_adapted_without_a_warning(gpt2: Path) -> None:
    assert any("c_attn.lora_A" in name for name in _names(adapted(gpt2, recipe_message("causal-lm", ["c_attn"]))))


def test_causal_models_classify_with_a_head_of_their_own(llama: Path) -> None:
    model = adapted(llama, recipe_message(targets=["q_proj"]))
    assert "base_model.model.score.weight" in _names(model)


def test_blocks_go_from_the_embeddings_to_the_head() -> None:
    names = [
        "base_model.model.classifier.weight",
        "base_model.model.bert.encoder.layer.10.attention.self.query.lora_A.weight",
        "base_model.model.bert.encoder.layer.2.attention.self.query.lora_A.weight",
        "base_model.model.bert.encoder.layer.2.attention.self.query.lora_B.weight",
        "base_model.model.bert.embeddings.word_embeddings.lora_embedding_A",
        "base_model.model.classifier.bias",
    ]
    assert lora.blocks(names) == [[names[4]], [names[2], names[3]], [names[1]], [names[5], names[0]]]


def test_an_encoders_blocks_come_before_its_decoders(t5: Path) -> None:
    found = lora.blocks(_names(adapted(t5, recipe_message("seq2seq-lm", ["q", "v"]))))
    assert [".".join(block[0].split(".")[2:5]) for block in found] == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]


def test_a_head_that_the_base_lacks_is_trained_whole(bert: Path) -> None:
    base = bases.load(bert, recipe.from_proto(recipe_message()), CPU)
    assert base.head == ("classifier",)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_pooler_that_the_base_lacks_is_trained_too(bert: Path, tmp_path: Path) -> None:
    # Left frozen it would hold other random values on every device.
    folder = shutil.copytree(bert, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "pooler" not in name}, folder / "model.safetensors", {"format": "pt"})
    names = _names(adapted(folder, recipe_message()))
    assert "base_model.model.bert.pooler.dense.weight" in names
    assert lora.blocks(names)[-1][0] == "base_model.model.bert.pooler.dense.bias"
