"""Which accelerator and type a device trains with."""

from __future__ import annotations

import pytest
import torch

from fleetune.errors import UnsupportedError
from fleetune.model import accelerator
from fleetune.model.accelerator import Accelerator


def test_auto_takes_what_is_there() -> None:
    assert accelerator.pick("auto").kind in accelerator.available()
    assert accelerator.pick("cpu").device == torch.device("cpu")


def test_an_absent_accelerator_is_named_with_those_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "available", lambda: ("cpu",))
    with pytest.raises(UnsupportedError, match=r"'cuda' is not present here: torch .* finds cpu"):
        accelerator.pick("cuda")


def test_an_unknown_accelerator_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="auto, cpu, cuda, mps"):
        accelerator.pick("tpu")


def test_auto_type_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu() -> None:
    assert accelerator.base_dtype("auto", Accelerator("cpu")) is torch.float32
    assert accelerator.base_dtype("auto", Accelerator("cuda")) is None
    assert accelerator.base_dtype("bfloat16", Accelerator("cpu")) is torch.bfloat16


def test_threads_are_those_that_the_owner_allows() -> None:
    before = torch.get_num_threads()
    try:
        assert accelerator.set_threads(1) == torch.get_num_threads() == 1
        assert accelerator.set_threads(0) >= 1
    finally:
        torch.set_num_threads(before)
