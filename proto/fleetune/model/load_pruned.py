"""Loads the pruned model that lies in this file's folder: `from load_pruned import load; model = load(".")`.

A config.json states one number of heads and one width for all layers. Here layers differ, or have fewer heads than the model's width
would have, so that `from_pretrained` refuses the weights. This file needs torch, transformers and safetensors, nothing else. It builds
the architecture that config.json names without taking memory for its unpruned weights, gives the layers that structure.json lists the
sizes that their tensors have, and loads the weights; every tensor has to be there and to fit.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

STRUCTURE = "structure.json"


def load(folder: str | Path) -> Any:
    """The model, in evaluation mode, in the types in which it was saved. ValueError where the folder's files do not belong together."""
    folder = Path(folder)
    structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    if structure.get("format") != 1 or model_class is None or config.model_type != structure.get("model_type"):
        raise ValueError(f"{STRUCTURE} and config.json in {folder} do not belong together, or are for a later version of this file.")
    with _weights_without_memory():
        model = model_class(config)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    modules = dict(model.named_modules())
    for name in structure["modules"]:
        _resize(modules[name], tensors[f"{name}.weight"])
    for name, attribute, value in structure["attributes"]:
        setattr(modules[name], attribute, value)
    found = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if found.unexpected_keys or absent:
        raise ValueError(f"The weights in {folder} are not those of its structure: {[*found.unexpected_keys, *absent][:5]}")
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _resize(module: Any, weight: torch.Tensor) -> None:
    if isinstance(module, torch.nn.Embedding):
        module.embedding_dim = weight.shape[1]
    else:
        module.out_features, module.in_features = weight.shape
        if module.bias is not None:
            module.bias = torch.nn.Parameter(torch.empty(weight.shape[0], device="meta"), requires_grad=False)
    module.weight = torch.nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)


@contextlib.contextmanager
def _weights_without_memory() -> Generator[None, None, None]:
    """Parameters that are made inside have a shape and no storage; buffers are made as ever, since no file holds them."""
    usual = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        # One that is on meta already is tied to another, and has to stay the same object.
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        usual(module, name, parameter)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]  # for a moment, as accelerate does
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = usual  # type: ignore[method-assign]
