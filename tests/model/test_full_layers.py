"""Whole layers as the trained part: found, trained in one copy, and saved so that any PEFT user can load them."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fleetune.errors import ModelError
from fleetune.model import adapter, depths, lora, recipe
from fleetune.model.lora import AdaptedModel
from fleetune.v1 import messages_pb2
from support.adapted import adapted
from support.jobs import recipe_message


def full(model_task: str = "text-classification", **more: str) -> messages_pb2.Recipe:
    message = recipe_message(model_task, **more)  # type: ignore[arg-type]  # texts alone
    message.ClearField("lora")
    return message


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {"input_ids": torch.randint(5, 100, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(**inputs()).logits
    return found


def changed(model: AdaptedModel) -> AdaptedModel:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers deprecates
@pytest.mark.parametrize(
    ("base", "task", "head", "auto"),
    [
        ("bert", "text-classification", True, transformers.AutoModelForSequenceClassification),
        ("llama", "causal-lm", False, transformers.AutoModelForCausalLM),
        ("gpt2", "causal-lm", False, transformers.AutoModelForCausalLM),
        ("t5", "seq2seq-lm", False, transformers.AutoModelForSeq2SeqLM),
    ],
)
def test_a_folder_of_whole_layers_is_one_that_peft_loads(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    base: str,
    task: str,
    head: bool,
    auto: type[transformers.AutoModelForCausalLM],
) -> None:
    folder = request.getfixturevalue(base)
    model = changed(adapted(folder, full(task)))
    adapter.write_config(tmp_path / adapter.CONFIG_NAME, model, "")
    adapter.write_state(tmp_path / adapter.STATE_NAME, model)
    options = {"num_labels": 3} if head else {}
    plain = auto.from_pretrained(folder, dtype=torch.float32, **options)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    if task == "seq2seq-lm":
        ours = load_file(tmp_path / adapter.STATE_NAME)
        theirs = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        return
    torch.testing.assert_close(logits(loaded), logits(model.model))


def test_the_blocks_are_the_layers_and_the_head(bert: Path) -> None:
    model = adapted(bert, full())
    blocks = depths.depth_blocks(model)
    assert [block.name for block in blocks] == ["head", "layer.1", "layer.0"]
    assert all(f"layer.{1}." in name for name in blocks[1].tensor_names)
    assert any(name.endswith("attention.self.query.weight") for name in blocks[1].tensor_names)
    layer = model.model.get_base_model().bert.encoder.layer[1]
    assert blocks[1].parameter_count == sum(parameter.numel() for parameter in layer.modules_to_save["default"].parameters())


def test_the_trained_layers_begin_as_those_of_the_base(bert: Path) -> None:
    ours = adapted(bert, full(), seed=5)
    with_lora = adapted(bert, recipe_message(), seed=5)
    torch.testing.assert_close(logits(ours.model), logits(with_lora.model))


def test_the_layers_are_held_once(bert: Path) -> None:
    model = adapted(bert, full())
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    assert model.parameter_count == sum(parameter.numel() for parameter in plain.parameters())


def test_a_state_is_loaded_into_the_model_that_computes(bert: Path, tmp_path: Path) -> None:
    model = changed(adapted(bert, full()))
    state = adapter.write_state(tmp_path / "state.safetensors", model).path
    other = adapted(bert, full(), seed=9)
    adapter.load_state(other, state)
    torch.testing.assert_close(logits(other.model), logits(model.model))


def test_one_layer_alone_keeps_less_than_the_ones_below_it(bert: Path) -> None:
    model = adapted(bert, full())
    batch = {**inputs(), "labels": torch.zeros(2, dtype=torch.long)}
    model.model.train()
    kept: list[int] = []
    for block in depths.depth_blocks(model):
        with depths.training_only(model, [block]):
            kept.append(depths.saved_bytes(model, batch))
    assert kept == sorted(set(kept))


def test_training_goes_on_from_layers_that_were_trained_before(bert: Path, tmp_path: Path) -> None:
    model = changed(adapted(bert, full()))
    adapter.write_config(tmp_path / adapter.CONFIG_NAME, model, "")
    adapter.write_state(tmp_path / adapter.STATE_NAME, model)
    other = adapted(bert, full(), seed=9)
    adapter.load_existing(other, tmp_path)
    torch.testing.assert_close(logits(other.model), logits(model.model))
    shutil.rmtree(tmp_path)


def test_half_types_are_refused(bert: Path) -> None:
    with pytest.raises(ModelError, match="whole layers"):
        recipe.from_proto(full(dtype="bfloat16"))


def test_a_heads_own_layers_are_no_layers(roberta: Path) -> None:
    blocks = depths.depth_blocks(adapted(roberta, full()))
    assert [block.name for block in blocks] == ["head", "layer.0"]
    assert lora.block_name(blocks[0].tensor_names[0]) == "head"


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_models import tiny_roberta

    return tiny_roberta(tmp_path_factory.mktemp("base") / "tiny-roberta")
