"""Which parts of a transformer go together when one of them is cut out: one table of dependency groups, read from config.json alone.

A *group* is a set of units of one kind that live or die one by one: the attention heads or the feed-forward neurons of a layer. With a
unit go rows of the modules that write it (queries, keys, values; the first feed-forward layer) and columns of the module that reads it.
The residual width, embeddings, norms and heads of the model are never cut: every layer depends on them.

Grouped queries: `heads_per_kv` query heads read one key/value head. A key/value head stays as long as one of its query heads does, and
all that stay must keep equally many of them, as attention repeats keys and values by one number a layer.

T5 makes one table of position biases in its first block and adds it in all blocks of the stack, so that a stack's blocks keep the same
heads: they are one group.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from fleetune.errors import ModelError

Kind = Literal["heads", "neurons"]
Counted = Literal["heads", "heads_per_kv", "width", "neurons"]

CONFIG_BYTES_MAX = 1 << 20
LAYERS_MAX = 512
HEADS_MAX = 1024
NEURONS_MAX = 1 << 20
WIDTH_MAX = 1 << 20


@dataclass(frozen=True)
class Sliced:
    """A module of a group, by the end of its full name. `axis` 0: its rows (outputs, with the bias), 1: its columns (inputs).

    `width` rows or columns belong to each unit; with `shared` to each key/value head instead.
    """

    path: str
    axis: Literal[0, 1]
    width: int
    shared: bool = False


@dataclass(frozen=True)
class Attribute:
    """A number that the module at `path` holds beside its weights, and what it counts."""

    path: str
    name: str
    counts: Counted


@dataclass(frozen=True)
class Group:
    """Units that are kept or cut one by one. `unit_parameters` weights and biases go with a unit, `kv_parameters` with a key/value head."""

    name: str
    kind: Kind
    units: int
    width: int
    heads_per_kv: int
    slices: tuple[Sliced, ...]
    attributes: tuple[Attribute, ...]
    unit_parameters: int
    kv_parameters: int

    @property
    def kv_heads(self) -> int:
        return self.units // self.heads_per_kv

    @property
    def parameters(self) -> int:
        return self.units * self.unit_parameters + self.kv_heads * self.kv_parameters


@dataclass(frozen=True)
class SizeKeys:
    """Where a config states its sizes. Without `head_dim` it states a number of heads only if that divides the model's width."""

    heads: str
    neurons: str
    kv_heads: str = ""
    head_dim: str = ""


@dataclass(frozen=True)
class Layout:
    """The groups of one model, in the order in which their bits travel."""

    model_type: str
    groups: tuple[Group, ...]
    keys: SizeKeys

    @property
    def prunable_parameters(self) -> int:
        return sum(group.parameters for group in self.groups)

    @cached_property
    def fingerprint(self) -> int:
        """32 bits that differ between layouts, to notice bits of another model."""
        lines = "\n".join(f"{group.name} {group.units} {group.heads_per_kv} {group.width}" for group in self.groups)
        return zlib.crc32(f"{self.model_type}\n{lines}".encode())

    @cached_property
    def modules(self) -> Mapping[str, tuple[int, Sliced]]:
        """Ends of module names to (group, what is cut there)."""
        return {piece.path: (index, piece) for index, group in enumerate(self.groups) for piece in group.slices}

    def module_of(self, name: str) -> tuple[int, Sliced] | None:
        """The entry for a module's full name; None for one that pruning leaves alone."""
        words = name.split(".")
        for begin in range(len(words)):
            found = self.modules.get(".".join(words[begin:]))
            if found is not None:
                return found
        return None


@dataclass(frozen=True)
class TensorCut:
    """Along which axis a tensor shrinks with a group."""

    group: int
    axis: Literal[0, 1]
    width: int
    shared: bool


def tensor_cut(layout: Layout, name: str) -> TensorCut | None:
    """How a tensor, by its full name (plain or as PEFT saves it), shrinks with the structure; None for one that stays whole.

    A LoRA pair shrinks on one side: B loses rows where its module does, A loses columns; the rank stays.
    """
    path, _, ending = name.rpartition(".")
    factor = ""
    if path.endswith((".lora_A", ".lora_B")):
        path, _, factor = path.rpartition(".")
    found = layout.module_of(path)
    if found is None:
        return None
    group, piece = found
    stays = {"lora_A": piece.axis == 0, "lora_B": piece.axis == 1}.get(factor, ending == "bias" and piece.axis == 1)
    return None if stays else TensorCut(group, piece.axis, piece.width, piece.shared)


def unscored(layout: Layout, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Names of groups of which no module gets a LoRA pair, so that nothing tells which of their units matter."""

    def targeted(path: str) -> bool:
        return any(path == target or path.endswith(f".{target}") for target in targets)

    return tuple(group.name for group in layout.groups if not any(targeted(piece.path) for piece in group.slices))


def check_targets(layout: Layout, targets: tuple[str, ...]) -> None:
    """ModelError unless each group has a module that the targets adapt, with the targets that would do."""
    missing = unscored(layout, targets)
    if missing:
        kinds = sorted({group.kind for group in layout.groups if group.name in missing})
        raise ModelError(
            f"With the LoRA targets {', '.join(map(repr, targets)) or '(none)'} nothing tells the importance of {' and '.join(kinds)}: "
            "it is taken from gradients of LoRA pairs.",
            f"Name all of these as targets: {', '.join(target_names(layout))}.",
        )


def target_names(layout: Layout) -> tuple[str, ...]:
    """LoRA targets that adapt every linear layer of every group, sorted; the shortest endings that name no other module."""
    paths = {piece.path for group in layout.groups for piece in group.slices if not piece.path.endswith(_BIAS_TABLE)}
    return tuple(sorted({_target(path) for path in paths}))


def _target(path: str) -> str:
    last = path.rpartition(".")[2]
    # BERT has three modules named `dense` in a layer, and one in its pooler.
    if last != "dense":
        return last
    return ".".join(word for word in path.split(".")[-3:] if not word.isdigit() and word != "layer")


def known() -> tuple[str, ...]:
    """The model types of the table."""
    return tuple(sorted(_TABLE))


def of_config(path: Path) -> Layout:
    """The groups of the model that the config.json at `path` describes. ModelError where it cannot be read, and as `layout` does."""
    try:
        with path.open("rb") as file:
            config: object = json.loads(file.read(CONFIG_BYTES_MAX))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Name a whole model folder.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object.", "Name a whole model folder.")
    return layout(cast("dict[str, object]", config))


def layout(config: Mapping[str, object]) -> Layout:
    """The groups of the model that a config.json describes.

    ModelError for an architecture that is not in the table, a quantised base, or sizes that do not fit together.
    """
    model_type = config.get("model_type")
    make = _TABLE.get(model_type) if isinstance(model_type, str) else None
    if make is None or not isinstance(model_type, str):
        raise ModelError(
            f"It is not known how the parts of a model of type {str(model_type)[:80]!r} depend on each other, so it cannot be pruned.",
            f"Use one of these model types: {', '.join(known())}; or a method that does not prune.",
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"The base model of type {model_type!r} is quantised; rows and columns of quantised weights cannot be cut out.",
            "Use the base in float32, float16 or bfloat16 and quantise the result.",
        )
    return make(model_type, _Config(model_type, config))


# ----------------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class _Config:
    """Reads sizes with bounds."""

    model_type: str
    values: Mapping[str, object]

    def size(self, key: str, limit: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ModelError(
                f"The config of the {self.model_type} model has {key} = {value!r}; a whole number from 1 to {limit} is needed.",
                "Correct its config.json.",
            )
        return value

    def flag(self, key: str) -> bool:
        return bool(self.values.get(key))

    def refuse(self, key: str, why: str) -> None:
        if self.values.get(key):
            raise ModelError(f"The {self.model_type} model has {key} = {self.values[key]!r}: {why}.", "Use a base without it.")


@dataclass(frozen=True)
class _Sizes:
    """Of one layer."""

    model: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(
                f"The config has {self.heads} attention heads, which cannot share {self.kv_heads} key/value heads equally.",
                "Correct its config.json.",
            )


@dataclass(frozen=True)
class _Attention:
    """Names below a block, and which linear layers have a bias."""

    query: str
    key: str
    value: str
    output: str
    attributes: tuple[Attribute, ...]
    biased: bool = False


@dataclass(frozen=True)
class _FeedForward:
    into: tuple[str, ...]
    out: str
    attributes: tuple[Attribute, ...] = ()
    biased: bool = False


_BIAS_TABLE = "relative_attention_bias"


def _heads(name: str, blocks: tuple[str, ...], names: _Attention, sizes: _Sizes, bias_buckets: int = 0) -> Group:
    """The attention heads of these blocks; of several, tied: each unit is a head of all of them."""
    slices: list[Sliced] = []
    attributes: list[Attribute] = []
    for block in blocks:
        slices += [
            Sliced(block + names.query, 0, sizes.head_dim),
            Sliced(block + names.key, 0, sizes.head_dim, shared=True),
            Sliced(block + names.value, 0, sizes.head_dim, shared=True),
            Sliced(block + names.output, 1, sizes.head_dim),
        ]
        attributes += [Attribute(block + entry.path, entry.name, entry.counts) for entry in names.attributes]
    if bias_buckets:
        slices.append(Sliced(blocks[0] + names.query.rpartition(".")[0] + "." + _BIAS_TABLE, 1, 1))
    row = sizes.model + int(names.biased)
    return Group(
        name=name,
        kind="heads",
        units=sizes.heads,
        width=sizes.head_dim,
        heads_per_kv=sizes.heads // sizes.kv_heads,
        slices=tuple(slices),
        attributes=tuple(attributes),
        unit_parameters=len(blocks) * sizes.head_dim * (row + sizes.model) + bias_buckets,
        kv_parameters=len(blocks) * 2 * sizes.head_dim * row,
    )


def _neurons(name: str, block: str, names: _FeedForward, sizes: _Sizes) -> Group:
    return Group(
        name=name,
        kind="neurons",
        units=sizes.neurons,
        width=1,
        heads_per_kv=1,
        slices=(*(Sliced(block + path, 0, 1) for path in names.into), Sliced(block + names.out, 1, 1)),
        attributes=tuple(Attribute(block + entry.path, entry.name, entry.counts) for entry in names.attributes),
        unit_parameters=len(names.into) * (sizes.model + int(names.biased)) + sizes.model,
        kv_parameters=0,
    )


def _uniform(stem: str, layers: int, attention: _Attention, forward: _FeedForward, sizes: _Sizes) -> Iterator[Group]:
    for index in range(layers):
        yield _heads(f"layer.{index}.heads", (f"{stem}.{index}.",), attention, sizes)
        yield _neurons(f"layer.{index}.neurons", f"{stem}.{index}.", forward, sizes)


_BERT_ATTENTION = _Attention(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    (Attribute("attention.self", "num_attention_heads", "heads"), Attribute("attention.self", "all_head_size", "width")),
    biased=True,
)
_BERT_FORWARD = _FeedForward(("intermediate.dense",), "output.dense", biased=True)


def _bert(model_type: str, config: _Config) -> Layout:
    """BERT and those built like it; MiniLM is a BERT."""
    config.refuse("add_cross_attention", "cross-attention of encoders is not in the table")
    sizes = _encoder_sizes(config, "hidden_size", "num_attention_heads", "intermediate_size")
    layers = config.size("num_hidden_layers", LAYERS_MAX)
    groups = _uniform("encoder.layer", layers, _BERT_ATTENTION, _BERT_FORWARD, sizes)
    return Layout(model_type, tuple(groups), SizeKeys("num_attention_heads", "intermediate_size"))


def _distilbert(model_type: str, config: _Config) -> Layout:
    sizes = _encoder_sizes(config, "dim", "n_heads", "hidden_dim")
    attention = _Attention(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        (Attribute("attention", "n_heads", "heads"),),
        biased=True,
    )
    forward = _FeedForward(("ffn.lin1",), "ffn.lin2", biased=True)
    groups = _uniform("transformer.layer", config.size("n_layers", LAYERS_MAX), attention, forward, sizes)
    return Layout(model_type, tuple(groups), SizeKeys("n_heads", "hidden_dim"))


def _encoder_sizes(config: _Config, width: str, heads: str, neurons: str) -> _Sizes:
    model, count = config.size(width, WIDTH_MAX), config.size(heads, HEADS_MAX)
    if model % count:
        raise ModelError(
            f"The config of the {config.model_type} model has {width} = {model}, which {count} heads do not divide.",
            "Correct its config.json.",
        )
    return _Sizes(model, count, count, model // count, config.size(neurons, NEURONS_MAX))


def _llama(model_type: str, config: _Config) -> Layout:
    """LLaMA and those built like it: grouped queries, gated feed-forward."""
    model, heads = config.size("hidden_size", WIDTH_MAX), config.size("num_attention_heads", HEADS_MAX)
    kv_heads = config.size("num_key_value_heads", HEADS_MAX, default=heads)
    head_dim = config.size("head_dim", WIDTH_MAX, default=max(1, model // heads))
    sizes = _Sizes(model, heads, kv_heads, head_dim, config.size("intermediate_size", NEURONS_MAX))
    attention = _Attention(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        (Attribute("self_attn", "num_key_value_groups", "heads_per_kv"),),
        biased=model_type == "qwen2" or config.flag("attention_bias"),
    )
    forward = _FeedForward(
        ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", (Attribute("mlp", "intermediate_size", "neurons"),), config.flag("mlp_bias")
    )
    groups = _uniform("layers", config.size("num_hidden_layers", LAYERS_MAX), attention, forward, sizes)
    return Layout(
        model_type, tuple(groups), SizeKeys("num_attention_heads", "intermediate_size", kv_heads="num_key_value_heads", head_dim="head_dim")
    )


def _t5(model_type: str, config: _Config) -> Layout:
    heads = config.size("num_heads", HEADS_MAX)
    sizes = _Sizes(config.size("d_model", WIDTH_MAX), heads, heads, config.size("d_kv", WIDTH_MAX), config.size("d_ff", NEURONS_MAX))
    gated = str(config.values.get("feed_forward_proj", "relu")).startswith("gated")
    into = ("wi_0", "wi_1") if gated else ("wi",)
    buckets = config.size("relative_attention_num_buckets", 1 << 16, default=32)
    counts = {"encoder": config.size("num_layers", LAYERS_MAX)}
    counts["decoder"] = config.size("num_decoder_layers", LAYERS_MAX, default=counts["encoder"])
    groups: list[Group] = []
    for stack, layers in counts.items():
        blocks = tuple(f"{stack}.block.{index}.layer." for index in range(layers))
        groups.append(_heads(f"{stack}.heads", blocks, _t5_attention("0.SelfAttention"), sizes, buckets))
        if stack == "decoder":
            groups.append(_heads("cross.heads", blocks, _t5_attention("1.EncDecAttention"), sizes))
        place = 1 if stack == "encoder" else 2
        forward = _FeedForward(tuple(f"{place}.DenseReluDense.{name}" for name in into), f"{place}.DenseReluDense.wo")
        groups += [_neurons(f"{stack}.layer.{index}.neurons", block, forward, sizes) for index, block in enumerate(blocks)]
    return Layout(model_type, tuple(groups), SizeKeys("num_heads", "d_ff", head_dim="d_kv"))


def _t5_attention(module: str) -> _Attention:
    counted = (Attribute(module, "n_heads", "heads"), Attribute(module, "inner_dim", "width"))
    return _Attention(f"{module}.q", f"{module}.k", f"{module}.v", f"{module}.o", counted)


_TABLE: Mapping[str, Callable[[str, _Config], Layout]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "electra": _bert,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "roberta": _bert,
    "t5": _t5,
    "xlm-roberta": _bert,
}
