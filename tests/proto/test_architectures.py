"""The table of dependency groups, read from configs alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fleetune import architectures
from fleetune.errors import ModelError

BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 128,
}  # fmt: skip
T5: dict[str, Any] = {"model_type": "t5", "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6}


def test_minilm_has_the_prunable_parameters_that_its_layers_have() -> None:
    layout = architectures.layout(BERT)
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    biases = 6 * (3 * 384 + 1536)
    assert [group.name for group in layout.groups[:3]] == ["layer.0.heads", "layer.0.neurons", "layer.1.heads"]
    assert layout.prunable_parameters == weights + biases


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match=r"'mamba'.*bert.*distilbert.*llama.*qwen3.*t5"):
        architectures.layout({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_attention_heads": 7}, "which 7 heads do not divide"),
        ({"num_hidden_layers": 10_000}, "num_hidden_layers = 10000"),
        ({"intermediate_size": "many"}, "intermediate_size = 'many'"),
        ({"intermediate_size": None}, "intermediate_size = None"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_a_config_that_cannot_be_pruned_is_refused_with_the_reason(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        architectures.layout(BERT | change)


def test_query_heads_that_cannot_share_key_value_heads_equally_are_refused() -> None:
    with pytest.raises(ModelError, match="8 attention heads, which cannot share 3"):
        architectures.layout(QWEN2 | {"num_key_value_heads": 3})


def test_grouped_queries_share_their_key_value_heads() -> None:
    heads = architectures.layout(QWEN2).groups[0]
    assert (heads.units, heads.heads_per_kv, heads.kv_heads, heads.width) == (8, 4, 2, 8)
    # Qwen2's queries, keys and values have biases, its output has none.
    assert heads.parameters == (64 * 64 + 64) + 64 * 64 + 2 * (16 * 64 + 16)


def test_heads_of_a_stack_of_t5_are_one_group() -> None:
    names = [group.name for group in architectures.layout(T5).groups]
    neurons = [f"{stack}.layer.{index}.neurons" for stack in ("encoder", "decoder") for index in (0, 1)]
    assert names == ["encoder.heads", *neurons[:2], "decoder.heads", "cross.heads", *neurons[2:]]


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("base_model.model.bert.encoder.layer.3.attention.self.query.lora_B.weight", 0),
        ("base_model.model.bert.encoder.layer.3.attention.self.query.lora_A.weight", None),
        ("base_model.model.bert.encoder.layer.3.attention.output.dense.lora_A.weight", 1),
        ("base_model.model.bert.encoder.layer.3.attention.output.dense.lora_B.weight", None),
        ("bert.encoder.layer.3.output.dense.weight", 1),
        ("bert.encoder.layer.3.output.dense.bias", None),
        ("encoder.layer.3.intermediate.dense.bias", 0),
        ("encoder.layer.9.intermediate.dense.bias", None),
        ("bert.pooler.dense.weight", None),
        ("base_model.model.classifier.weight", None),
        ("bert.encoder.layer.3.attention.output.LayerNorm.weight", None),
    ],
)
def test_a_tensor_shrinks_along_the_side_that_its_module_is_cut_on(name: str, axis: int | None) -> None:
    cut = architectures.tensor_cut(architectures.layout(BERT), name)
    assert (None if cut is None else cut.axis) == axis


def test_targets_that_leave_neurons_without_a_score_are_refused_with_those_that_would_do() -> None:
    with pytest.raises(ModelError, match=r"'query', 'value' nothing tells the importance of neurons.*intermediate\.dense.*query"):
        architectures.check_targets(architectures.layout(BERT), ("query", "value"))


@pytest.mark.parametrize("config", [BERT, QWEN2, T5])
def test_the_targets_that_are_named_reach_every_group(config: dict[str, Any]) -> None:
    layout = architectures.layout(config)
    architectures.check_targets(layout, architectures.target_names(layout))


def test_layouts_of_different_sizes_have_different_fingerprints() -> None:
    sizes: list[dict[str, Any]] = [
        {},
        {"num_hidden_layers": 5},
        {"num_attention_heads": 6},
        {"intermediate_size": 1528},
        {"model_type": "roberta"},
    ]
    assert len({architectures.layout(BERT | change).fingerprint for change in sizes}) == len(sizes)


def test_the_table_is_read_without_torch_or_numpy() -> None:
    script = "import sys, fleetune.architectures, fleetune.structures, fleetune.sparsity; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"
