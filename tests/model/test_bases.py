"""Which folders and ids are taken for base models, and what is said of the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fleetune.errors import ModelError
from fleetune.model import bases, recipe
from support.adapted import CPU, adapted
from support.jobs import recipe_message


def _load(folder: Path, **changes: object) -> bases.LoadedBase:
    return bases.load(folder, recipe.from_proto(recipe_message(**changes)), CPU)  # type: ignore[arg-type]  # fields of the recipe


def test_a_folder_is_a_base(bert: Path) -> None:
    found = bases.resolve(str(bert), "", allow_hub=False)
    assert (found.folder, found.hub_id, found.public_name) == (bert.resolve(), "", "tiny-bert")


def test_a_public_name_is_never_a_path_and_never_the_ancestors_name(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "my-minilm" / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/ancestor"}))
    assert bases.public_name(folder) == "my-minilm"


def test_a_hub_id_is_refused_where_the_hub_is_not_allowed() -> None:
    with pytest.raises(ModelError, match="'org/name' is a hub id, and this machine may not use the hub"):
        bases.resolve("org/name", "main", allow_hub=False)


def test_a_hub_id_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="'org/absent' at revision 'v1' cannot be fetched"):
        bases.resolve("org/absent", "v1", allow_hub=True)


@pytest.mark.parametrize("base", ["./absent", "/absent", "a/b/c", "org/../x"])
def test_what_is_neither_folder_nor_id_is_refused(base: str) -> None:
    with pytest.raises(ModelError, match="neither a folder"):
        bases.resolve(base, "", allow_hub=True)


def test_pickled_weights_are_not_loaded(bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*only safetensors"):
        bases.check_folder(tmp_path)


def test_a_folder_with_an_adapter_beside_the_model_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "base")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter beside the model"):
        bases.check_folder(folder)


def test_code_that_comes_with_a_model_is_not_run(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "strange"
    config["auto_map"] = {"AutoConfig": "strange.Config", "AutoModelForSequenceClassification": "strange.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="cannot be loaded for text-classification"):
        _load(folder)
    assert not (tmp_path / "ran").exists()


def test_an_encoder_is_no_language_model(bert: Path) -> None:
    with pytest.raises(ModelError, match="causal-lm"):
        _load(bert, model_task="causal-lm", targets=["query"])


def test_torn_weights_are_a_model_error(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        _load(folder)


def test_a_tokenizer_without_padding_pads_with_its_end(gpt2: Path) -> None:
    base = _load(gpt2, model_task="causal-lm", targets=["c_attn"])
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == base.model.config.pad_token_id


def test_the_jobs_labels_become_the_models(bert: Path) -> None:
    config = _load(bert, labels=["up", "down"]).model.config
    assert (config.id2label, config.label2id) == ({0: "up", 1: "down"}, {"up": 0, "down": 1})


def test_a_base_that_was_tuned_for_other_labels_gets_a_new_head(bert: Path, tmp_path: Path) -> None:
    tuned = adapted(bert, recipe_message(labels=["a", "b", "c", "d"]))
    merged = tuned.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    tuned.tokenizer.save_pretrained(tmp_path / "tuned")
    again = adapted(tmp_path / "tuned", recipe_message(labels=["up", "down"]))
    assert {tuple(t.parameter.shape) for t in again.trainables if t.name.endswith("classifier.weight")} == {(2, 32)}
