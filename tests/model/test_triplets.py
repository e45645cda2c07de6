"""A base with triplet adapters: its ranks follow the state, and what has no rank is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.errors import ModelError
from fleetune.model import adapter, evaluation, recipe, triplets
from fleetune.model.svdadapter import SvdLinear
from fleetune.model.triplets import PREFIX, Triplets
from fleetune.wire import codec
from support.adapted import CPU, examples
from support.jobs import recipe_message

LOWER = "bert.encoder.layer.0.attention.self.query"
UPPER = "bert.encoder.layer.1.attention.self.value"


def made(base: Path, seed: int | None = 1, **settings: Any) -> Triplets:
    return triplets.load(base, recipe.from_proto(recipe_message(**settings)), CPU, seed)


def state_of(model: Triplets, path: Path) -> Path:
    return adapter.write_state(path, model.adapted).path


def test_every_target_begins_with_the_jobs_rank_and_the_model_is_what_it_was(bert: Path, rows_file: Path) -> None:
    model = made(bert)
    assert len(model.ranks) == 4 and set(model.ranks.values()) == {4}
    items = examples(model.adapted, rows_file).items
    before = evaluation.evaluate(model.adapted, items).metrics
    model.fit({})
    assert evaluation.evaluate(model.adapted, items).metrics == before
    assert {entry.name for entry in model.adapted.trainables} == {f"{PREFIX}classifier.bias", f"{PREFIX}classifier.weight"}


def test_the_same_seed_gives_the_same_state(bert: Path, tmp_path: Path) -> None:
    assert state_of(made(bert), tmp_path / "a").read_bytes() == state_of(made(bert), tmp_path / "b").read_bytes()


def test_the_model_takes_the_ranks_of_the_state_that_it_loads(bert: Path, tmp_path: Path) -> None:
    small, large = made(bert), made(bert)
    whole = state_of(large, tmp_path / "whole")
    small.fit({LOWER: 3, UPPER: 1})
    with torch.no_grad():
        for entry in small.adapted.trainables:
            entry.parameter.fill_(0.25)
    path = state_of(small, tmp_path / "state")
    large.load(path, codec.trainables_digest(codec.read_table(path)))
    assert large.ranks == {LOWER: 3, UPPER: 1}
    assert all(bool((entry.parameter == 0.25).all()) for entry in large.adapted.trainables)
    large.load(whole)
    assert set(large.ranks.values()) == {4}


def test_a_module_without_rank_is_the_plain_layer_and_has_no_parameters(bert: Path) -> None:
    model = made(bert)
    model.fit({UPPER: 2})
    network = model.adapted.model
    assert type(network.get_submodule(LOWER)) is torch.nn.Linear
    assert [name for name, module in network.named_modules() if isinstance(module, SvdLinear)] == [UPPER]
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {f"{UPPER}.{part}" for part in ("right", "left", "values")} | {"classifier.weight", "classifier.bias"}


def test_nothing_is_kept_for_a_backward_pass_below_the_lowest_module_that_is_left(bert: Path, rows_file: Path) -> None:
    model = made(bert)
    items = examples(model.adapted, rows_file).items

    def has_graph() -> bool:
        seen: list[bool] = []
        layer = model.adapted.model.bert.encoder.layer[0]
        handle = layer.register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad))
        from fleetune.model.batches import collate

        model.adapted.model(**collate(items[:2], model.adapted.tokenizer.pad_token_id, CPU.device)).loss.backward()
        handle.remove()
        return seen[0]

    assert has_graph()
    model.fit({UPPER: 1})
    assert not has_graph()
    assert model.adapters[UPPER].values.grad is not None


def test_dropout_is_for_training_alone(bert: Path) -> None:
    model = made(bert, dropout=0.5)
    module = model.adapters[LOWER]
    with torch.no_grad():
        module.left.fill_(1.0)
    inputs = torch.ones(2, 32)
    module.train()
    assert not torch.equal(module(inputs), module(inputs))
    module.eval()
    assert torch.equal(module(inputs), module(inputs))


def test_a_module_that_is_no_target_is_refused_before_anything_changes(bert: Path) -> None:
    model = made(bert)
    with pytest.raises(ModelError, match=r"'bert\.pooler'"):
        model.fit({"bert.pooler": 1})
    with pytest.raises(ModelError, match="the rank 5; 1 to 4 are allowed"):
        model.fit({LOWER: 5})
    assert set(model.ranks.values()) == {4}


def test_parts_that_do_not_belong_together_are_refused(bert: Path, tmp_path: Path) -> None:
    model = made(bert)
    tensors = load_file(state_of(model, tmp_path / "state"))
    tensors[f"{PREFIX}{LOWER}.lora_E"] = torch.zeros(3)
    save_file(tensors, tmp_path / "odd")
    with pytest.raises(ModelError, match=r"adapter of .*query consists of A \[4, 32\], B \[32, 4\], E \[3\]"):
        model.load(tmp_path / "odd")
    del tensors[f"{PREFIX}{LOWER}.lora_E"]
    save_file(tensors, tmp_path / "odd")
    with pytest.raises(ModelError, match="consists of A"):
        model.load(tmp_path / "odd")


def test_embeddings_are_no_place_for_triplets(bert: Path) -> None:
    with pytest.raises(ModelError, match="beside linear layers alone"):
        made(bert, targets=("word_embeddings",))


def test_the_configuration_is_that_of_a_plain_lora(bert: Path, tmp_path: Path) -> None:
    made(bert).write_config(tmp_path / "adapter_config.json", "some/base")
    text = (tmp_path / "adapter_config.json").read_text()
    assert '"peft_type": "LORA"' in text and '"some/base"' in text
