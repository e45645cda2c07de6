"""The frozen pretrained model: found on disk or on the hub, loaded from safetensors only, with its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fleetune.child.entry import is_out_of_memory
from fleetune.errors import ModelError
from fleetune.model import accelerator as accelerators
from fleetune.model.recipe import CAUSAL_LM, CLASSIFICATION, SEQ2SEQ_LM, Recipe

HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
)
"""The only files that are fetched from the hub: no pickle, no Python."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DEPTH = re.compile(r"\.(?:layers?|h|blocks?)\.\d+\.")

Model = Any  # transformers' and peft's model classes are untyped mixtures; their tensors are typed where we touch them
Tokenizer = Any  # the same for its tokenizers


@dataclass(frozen=True)
class BaseFolder:
    """A base model on this machine's disk. `hub_id` and `revision` are empty for a plain folder."""

    folder: Path
    hub_id: str
    revision: str
    public_name: str


@dataclass(frozen=True)
class LoadedBase:
    """The frozen model and its tokenizer; `head` names the modules that are trained whole because the base brings none for this job."""

    model: Model
    tokenizer: Tokenizer
    head: tuple[str, ...]
    public_name: str


def resolve(base: str, revision: str, allow_hub: bool) -> BaseFolder:
    """The folder of a base given as folder or as hub id (fetched through the hub's own cache where allowed).

    Raises ModelError that names the base, what is allowed and the remedy.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return BaseFolder(folder.resolve(), "", "", public_name(folder))
    if base.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(base):
        raise ModelError(
            f"The base model {base!r} is neither a folder on this machine nor a hub id such as 'org/name'.",
            "Correct `base` in the job, or put the model's folder there.",
        )
    if not allow_hub:
        raise ModelError(
            f"The base model {base!r} is a hub id, and this machine may not use the hub.",
            "Allow the hub in the configuration, or name a folder that holds the model.",
        )
    return _fetch(base, revision)


def _fetch(hub_id: str, revision: str) -> BaseFolder:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, revision=revision or None, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError) as error:
        wanted = f"{hub_id!r} at revision {revision!r}" if revision else f"{hub_id!r}"
        raise ModelError(
            f"The base model {wanted} cannot be fetched: {_first_line(error)}",
            "Check the id, the revision and this machine's access to the hub, or name a folder that holds the model.",
        ) from error
    check_folder(folder)
    # The hub cache's folder is named by the commit, which is exact where the job named a branch.
    return BaseFolder(folder, hub_id, folder.name if folder.parent.name == "snapshots" else revision, hub_id)


def check_folder(folder: Path) -> None:
    """Raises ModelError unless the folder holds a configuration and safetensors weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"The folder {str(folder)!r} holds no config.json, so it is no model.",
            "Name the folder that holds config.json and *.safetensors.",
        )
    if (folder / "adapter_config.json").exists():
        # transformers would put that adapter on the base by itself, here and not on devices that fetch the base's own files.
        raise ModelError(
            f"The folder {str(folder)!r} holds an adapter beside the model.",
            "Move the adapter away, and name it as the job's starting adapter.",
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5") for path in folder.glob(pattern))
        found = f" (found {', '.join(others)}, which can run code when loaded)" if others else ""
        raise ModelError(
            f"The folder {str(folder)!r} holds no *.safetensors weights{found}; only safetensors is loaded.",
            "Convert the weights with transformers' save_pretrained and use that folder.",
        )


def public_name(folder: Path) -> str:
    """What adapters call a base that has no hub id: the folder's bare name, or its parent's where that says nothing.

    Never the `_name_or_path` of its configuration: there stands what the model was made from, and an adapter that is put on its
    base's ancestor loads without a complaint and answers nonsense.
    """
    named = folder.resolve()
    while named.name.lower() in _EMPTY_NAMES and named.parent.name:
        named = named.parent
    return named.name


_EMPTY_NAMES = frozenset({"model", "models", "base", "weights", "checkpoint", "main", "snapshot", "snapshots"})


def load(folder: Path, recipe: Recipe, accelerator: accelerators.Accelerator) -> LoadedBase:
    """The model for the recipe's task, on the accelerator, frozen; never runs code that came with it.

    Raises ModelError where the folder does not hold a model for this task.
    """
    check_folder(folder)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers' logging is untyped
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as above
    settings: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
        "dtype": accelerators.base_dtype(recipe.dtype, accelerator) or "auto",
    }
    if recipe.model_task == CLASSIFICATION:
        settings |= {
            "num_labels": len(recipe.labels),
            "id2label": dict(enumerate(recipe.labels)),
            "label2id": {label: index for index, label in enumerate(recipe.labels)},
            "problem_type": "single_label_classification",
            # A base that was fine-tuned for other labels keeps its body; its head is made anew and trained.
            "ignore_mismatched_sizes": True,
        }
    try:
        model, info = _AUTO_CLASSES[recipe.model_task].from_pretrained(str(folder), **settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"The base model in {str(folder)!r} cannot be loaded for {recipe.model_task}: {_first_line(error)}",
            "Use a folder that transformers loads for this task without code of its own.",
        ) from error
    head = _head(model, info, recipe)
    _set_padding(model, tokenizer, folder)
    model.requires_grad_(False)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # a key/value cache is of no use without generation and costs memory
    return LoadedBase(model.to(accelerator.device), tokenizer, head, public_name(folder))


_AUTO_CLASSES: dict[str, Any] = {  # factories without a common type
    CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    CAUSAL_LM: transformers.AutoModelForCausalLM,
    SEQ2SEQ_LM: transformers.AutoModelForSeq2SeqLM,
}


def _head(model: Model, info: dict[str, Any], recipe: Recipe) -> tuple[str, ...]:
    """Modules outside the layers that the base has no weights for, and the usual classification heads.

    All of them become part of the adapter: a frozen random tensor would differ from device to device and be lost on loading.
    """
    absent = {*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])}
    if recipe.model_task != CLASSIFICATION:
        if absent:
            raise _not_this_model(absent, recipe)
        return ()
    modules = {name.rpartition(".")[0] for name in absent}
    inside = sorted(name for name in absent if _DEPTH.search(f".{name}") or "embed" in name)
    if inside or "" in modules:
        raise _not_this_model(inside or absent, recipe)
    modules |= {name for name, _ in model.named_children() if name in _HEAD_NAMES}
    # A head of several layers is trained as one module.
    modules = {name.split(".")[0] if name.split(".")[0] in _HEAD_NAMES else name for name in modules}
    if not modules:
        raise ModelError(
            f"The model {type(model).__name__} has no classification head that is known here; known names: {', '.join(_HEAD_NAMES)}.",
            "Use a base whose architecture has a sequence classification head.",
        )
    return tuple(sorted(modules))


_HEAD_NAMES = ("classifier", "score", "classification_head", "pre_classifier", "head")


def _not_this_model(absent: Iterable[str], recipe: Recipe) -> ModelError:
    names = sorted(absent)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ModelError(
        f"The base model has no weights for {shown}, which {recipe.model_task} needs.",
        "Use a base that was trained for this task, or correct `task` in the job.",
    )


def _set_padding(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"The tokenizer in {str(folder)!r} has neither a padding nor an end-of-sequence token.",
                "Add `pad_token` to its tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    # Causal classifiers look for the last token that is not padding.
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def device_of(model: Model) -> torch.device:
    """Where the model's weights lie."""
    device = next(iter(model.parameters())).device
    assert isinstance(device, torch.device)
    return device
