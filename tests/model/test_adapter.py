"""The adapter's files: what PEFT loads, what is refused, what they never contain."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from fleetune.errors import ModelError
from fleetune.model import adapter, lora
from fleetune.wire import codec
from support.adapted import adapted
from support.jobs import recipe_message

CASES = {
    "bert": ("text-classification", ["query", "value"], AutoModelForSequenceClassification),
    "llama": ("causal-lm", ["q_proj", "v_proj"], AutoModelForCausalLM),
    "gpt2": ("causal-lm", ["c_attn"], AutoModelForCausalLM),
    "t5": ("seq2seq-lm", ["q", "v"], AutoModelForSeq2SeqLM),
}

# peft asks transformers by an older name.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _save(model: lora.AdaptedModel, folder: Path, base_name: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    adapter.write_config(folder / adapter.CONFIG_NAME, model, base_name)
    adapter.write_state(folder / adapter.STATE_NAME, model)
    return folder


def _shake(model: lora.AdaptedModel) -> None:
    """A fresh adapter does nothing, as its B are zero: random values show whether it is really loaded."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.copy_(torch.randn_like(parameter) * 0.3)


@PEFT_WARNS
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_the_folder_as_it_is(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base: Path = request.getfixturevalue(name)
    task, targets, auto = CASES[name]
    model = adapted(base, recipe_message(task, targets))
    _shake(model)
    folder = _save(model, tmp_path / "adapter")
    labels = {"num_labels": 3} if task == "text-classification" else {}
    loaded = peft.PeftModel.from_pretrained(auto.from_pretrained(base, **labels), str(folder)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids} if task == "seq2seq-lm" else {})
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model.model.eval()(**inputs).logits, atol=1e-5)


def test_the_state_is_what_peft_itself_would_save(bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, recipe_message())
    _save(model, tmp_path / "ours")
    model.model.save_pretrained(tmp_path / "pefts", save_embedding_layers=False)
    ours, pefts = load_file(tmp_path / "ours" / adapter.STATE_NAME), load_file(tmp_path / "pefts" / adapter.STATE_NAME)
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[name], pefts[name]) for name in ours)
    table = codec.read_table(tmp_path / "ours" / adapter.STATE_NAME)
    assert table.metadata == {"format": "pt"}
    assert table.in_file_order == table.specs


def test_the_configuration_names_no_path_of_this_machine(bert: Path, tmp_path: Path) -> None:
    _save(adapted(bert, recipe_message()), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / adapter.CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == "tiny-bert"
    assert config["target_modules"] == ["query", "value"]
    assert str(bert.parent) not in (tmp_path / "adapter" / adapter.CONFIG_NAME).read_text()


def test_a_hub_id_stands_as_the_base(bert: Path, tmp_path: Path) -> None:
    _save(adapted(bert, recipe_message()), tmp_path / "adapter", "org/name")
    assert json.loads((tmp_path / "adapter" / adapter.CONFIG_NAME).read_text())["base_model_name_or_path"] == "org/name"


def test_a_state_goes_out_and_comes_back(bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, recipe_message())
    _shake(model)
    wanted = [parameter.detach().clone() for parameter in model.parameters]
    written = adapter.write_state(tmp_path / "state", model)
    other = adapted(bert, recipe_message(), seed=2)
    adapter.load_state(other, tmp_path / "state", codec.trainables_digest(codec.read_table(written.path)))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("base_model.model.classifier.bias"), "1 missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 unexpected"),
        (lambda tensors: tensors.update({"base_model.model.classifier.bias": torch.zeros(4)}), r"shape \[4\], \[3\] is expected"),
        (lambda tensors: tensors.update({"base_model.model.classifier.bias": torch.zeros(3).half()}), "is F16, F32 is expected"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_a_state_that_does_not_fit_changes_nothing(bert: Path, tmp_path: Path, change: object, complaint: str) -> None:
    model = adapted(bert, recipe_message())
    adapter.write_state(tmp_path / "state", model)
    tensors = {name: tensor + 1 for name, tensor in load_file(tmp_path / "state").items()}
    assert callable(change)
    change(tensors)
    save_file(tensors, tmp_path / "changed")
    before = [parameter.detach().clone() for parameter in model.parameters]
    with pytest.raises(ModelError, match=complaint):
        adapter.load_state(model, tmp_path / "changed")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters, before, strict=True))


def test_an_existing_adapter_is_a_start(bert: Path, tmp_path: Path) -> None:
    trained = adapted(bert, recipe_message())
    _shake(trained)
    trained.model.save_pretrained(tmp_path / "pefts", save_embedding_layers=False)
    model = adapted(bert, recipe_message(), seed=3)
    adapter.load_existing(model, tmp_path / "pefts")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters, trained.parameters, strict=True))


def test_an_existing_adapter_of_other_values_lists_them_all(bert: Path, tmp_path: Path) -> None:
    adapted(bert, recipe_message(rank=2, targets=["key"])).model.save_pretrained(tmp_path / "pefts", save_embedding_layers=False)
    with pytest.raises(ModelError, match=r"its r is 2, the job's 4; its lora_alpha is 4\.0, the job's 8\.0; its targets are \['key'\]"):
        adapter.load_existing(adapted(bert, recipe_message()), tmp_path / "pefts")


def test_an_adapter_folder_without_safetensors_is_refused(bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, recipe_message())
    adapter.write_config(tmp_path / adapter.CONFIG_NAME, model, "")
    with pytest.raises(ModelError, match="only safetensors"):
        adapter.load_existing(model, tmp_path)


def test_a_failed_write_leaves_nothing_behind(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        adapter.write_tensors(tmp_path / "state", {"a": torch.zeros(1, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []
