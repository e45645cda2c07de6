"""Pruned models as folders that load where Fleetune is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from fleetune import structures
from fleetune.errors import ModelError, WireError
from fleetune.model import load_pruned, prunedfolder
from fleetune.model.pruning import Pruned
from support import prunable, tiny_models

LOAD = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fleetune":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import safetensors.torch, torch, transformers
for folder in sys.argv[1:]:
    if json.load(open(f"{folder}/how.json")) == "plain":
        architecture = json.load(open(f"{folder}/config.json"))["architectures"][0]
        model = getattr(transformers, architecture).from_pretrained(folder).eval()
    else:
        sys.path.insert(0, folder)
        from load_pruned import load
        model = load(folder)
    with torch.no_grad():
        logits = model(**safetensors.torch.load_file(f"{folder}/batch")).logits
    safetensors.torch.save_file({"logits": logits}, f"{folder}/logits")
assert not any(name.partition(".")[0] == "fleetune" for name in sys.modules)
"""


def pruned_of(name: str, uneven: bool, lora: bool = True) -> Pruned:
    base = prunable.made(name)
    pruned = Pruned(prunable.adapted(base) if lora else base, prunable.layout_of(base))
    pruned.cut_to(prunable.structure(pruned.layout, 0.5, uneven=uneven))
    return pruned


def test_saved_folders_load_in_a_process_without_fleetune(tmp_path: Path) -> None:
    expected: dict[Path, torch.Tensor] = {}
    for name, uneven, plain in (("llama", False, True), ("t5", True, False), ("bert", True, False)):
        pruned = pruned_of(name, uneven)
        batch = prunable.inputs(pruned.model)
        before = prunable.logits(pruned.model, batch)
        merged = prunedfolder.merged(pruned)
        saved = prunedfolder.save(tmp_path / name, merged)
        assert saved.plain is plain
        assert (saved.folder / "load_pruned.py").exists() is not plain
        expected[saved.folder] = prunable.logits(merged.model, batch)
        torch.testing.assert_close(expected[saved.folder], before, atol=5e-5, rtol=1e-4)
        safetensors.torch.save_file(batch, saved.folder / "batch")
        (saved.folder / "how.json").write_text(json.dumps("plain" if plain else "loader"))
    # -I: neither PYTHONPATH nor the working folder; an editable install is kept out by the script.
    done = subprocess.run([sys.executable, "-I", "-c", LOAD, *map(str, expected)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, logits in expected.items():
        found = safetensors.torch.load_file(folder / "logits")["logits"]
        # The same weights; another process may add them up with other threads.
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", prunable.MODELS)
def test_the_loader_gives_back_exactly_the_model_that_was_saved(name: str, tmp_path: Path) -> None:
    pruned = pruned_of(name, uneven=True, lora=False)
    saved = prunedfolder.save(tmp_path / "model", pruned, base_digest="ab" * 32)
    assert not saved.plain
    batch = prunable.inputs(pruned.model)
    assert torch.equal(prunable.logits(load_pruned.load(saved.folder), batch), prunable.logits(pruned.model, batch))
    assert prunedfolder.read_structure(saved.folder, pruned.layout) == pruned.structure


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "t5", "t5-gated"])
def test_a_uniform_structure_loads_with_plain_transformers(name: str, tmp_path: Path) -> None:
    pruned = pruned_of(name, uneven=False, lora=False)
    saved = prunedfolder.save(tmp_path / "model", pruned)
    assert saved.plain
    model: prunable.Model = pruned.model
    again = type(model).from_pretrained(saved.folder).eval()
    batch = prunable.inputs(pruned.model)
    assert torch.equal(prunable.logits(again, batch), prunable.logits(pruned.model, batch))


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_an_encoder_that_lost_neurons_alone_loads_with_plain_transformers(name: str, tmp_path: Path) -> None:
    model = prunable.made(name)
    pruned = Pruned(model, prunable.layout_of(model))
    half = prunable.structure(pruned.layout, 0.5)
    whole = structures.whole(pruned.layout)
    kept = tuple(
        few if group.kind == "neurons" else all_ for group, few, all_ in zip(pruned.layout.groups, half.kept, whole.kept, strict=True)
    )
    pruned.cut_to(structures.Structure(1, kept))
    saved = prunedfolder.save(tmp_path / "model", pruned)
    assert saved.plain
    again = type(model).from_pretrained(saved.folder).eval()
    batch = prunable.inputs(model)
    assert torch.equal(prunable.logits(again, batch), prunable.logits(model, batch))


def test_transformers_alone_refuses_sizes_that_the_config_cannot_state(tmp_path: Path) -> None:
    saved = prunedfolder.save(tmp_path / "model", pruned_of("bert", uneven=False, lora=False))
    model_class = type(prunable.made("bert"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model_class.from_pretrained(saved.folder)


def test_the_folder_names_no_path_of_this_machine(tmp_path: Path) -> None:
    tokenizer_folder = tiny_models.tiny_classifier(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tokenizer_folder, num_labels=2)
    pruned = Pruned(model, prunable.layout_of(model))
    pruned.cut_to(prunable.structure(pruned.layout, 0.5))
    saved = prunedfolder.save(tmp_path / "model", pruned, transformers.AutoTokenizer.from_pretrained(tokenizer_folder))
    texts = [path.read_text(encoding="utf-8") for path in saved.folder.iterdir() if path.suffix in (".json", ".md", ".py")]
    assert len(texts) >= 5
    assert not any(str(tmp_path) in text for text in texts)
    assert saved.size_bytes == sum(path.stat().st_size for path in saved.folder.iterdir())


def test_a_structure_of_another_version_is_refused(tmp_path: Path) -> None:
    pruned = pruned_of("bert", uneven=True, lora=False)
    saved = prunedfolder.save(tmp_path / "model", pruned)
    with pytest.raises(ModelError, match="has structure version 1, 2 is expected"):
        prunedfolder.read_structure(saved.folder, pruned.layout, version=2)


def test_a_structure_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    pruned = pruned_of("bert", uneven=True, lora=False)
    saved = prunedfolder.save(tmp_path / "model", pruned)
    file = saved.folder / "structure.json"
    value = json.loads(file.read_text())
    value["groups"][0]["kept"] = "0-99"
    file.write_text(json.dumps(value))
    with pytest.raises(WireError, match="0-99"):
        prunedfolder.read_structure(saved.folder, pruned.layout)


def test_weights_of_another_structure_are_refused_by_the_loader(tmp_path: Path) -> None:
    saved = prunedfolder.save(tmp_path / "model", pruned_of("bert", uneven=True, lora=False))
    weights = safetensors.torch.load_file(saved.folder / "model.safetensors")
    del weights["bert.encoder.layer.0.attention.output.dense.bias"]
    safetensors.torch.save_file(weights, saved.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.output\.dense\.bias"):
        load_pruned.load(saved.folder)


def test_a_model_with_an_adapter_beside_its_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter"):
        prunedfolder.save(tmp_path / "model", pruned_of("bert", uneven=False))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists"):
        prunedfolder.save(tmp_path, pruned_of("bert", uneven=False, lora=False))


def test_the_loader_takes_no_memory_for_what_was_cut() -> None:
    with load_pruned._weights_without_memory():
        model = prunable.MODELS["bert"]()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
