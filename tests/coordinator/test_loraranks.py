"""Ranks of devices by name, as a job file gives them, and what they exclude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest

from fleetune.complaints import Complaint
from fleetune.coordinator import jobspec, loraranks, recipes
from fleetune.coordinator.jobsections import AggregationName
from fleetune.coordinator.jobspec import JobFileError, JobSpec
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.fedavg_lora import METHOD
from fleetune.coordinator.rounds.optimizers import FedAvgM
from fleetune.methods.v1 import fedavg_lora_pb2

FILE = """
name = "job"
[model]
base = "org/name"
[task]
kind = "causal-lm"
[lora]
rank = 8
alpha = 24.0
[data]
name = "rows"
[method]
{method}
[method.ranks]
{ranks}
"""


def job(ranks: str = "", method: str = "") -> JobSpec:
    return jobspec.parse(FILE.format(ranks=ranks, method=method))


def complaints_of(method: str, ranks: str = "") -> Sequence[Complaint]:
    with pytest.raises(JobFileError) as caught:
        job(ranks, method)
    return caught.value.complaints


def complaints(ranks: str = "", method: str = "") -> dict[str, str]:
    return {complaint.path: complaint.remedy for complaint in complaints_of(method, ranks)}


def test_the_first_pattern_that_fits_holds() -> None:
    spec = job('"pi4-*" = 2\n"pi?-x" = 3\n"*" = 6')
    assert [loraranks.rank_of(spec, name) for name in ("pi4-x", "pi5-x", "laptop", "PI4-x")] == [2, 3, 6, 6]
    assert loraranks.rank_of(job('"pi4-*" = 2'), "laptop") == 8


def test_the_scale_is_the_same_for_every_rank() -> None:
    assert loraranks.scale(job('"pi4-*" = 2')) == 3.0


def test_unequal_ranks_are_folded_exactly_and_equal_ones_as_before() -> None:
    assert job('"pi4-*" = 2').method.aggregation == "exact"
    assert job().method.aggregation == "fedit"
    assert job('"pi4-*" = 2', 'aggregation = "zero-pad"').method.aggregation == "zero-pad"
    assert METHOD.fold(job('"pi4-*" = 2'), 3) == LoraFold("exact", 8, 3.0, 3, narrower=True)
    assert METHOD.fold(job(), 3) == LoraFold("fedit", 8, 3.0, 3, narrower=False)
    assert METHOD.fold(job("", 'server_optimizer = "fedavgm"'), 3) == FedAvgM(1.0, 0.9)


def tasks(spec: JobSpec, number: int = 1) -> dict[str, fedavg_lora_pb2.FedavgLoraTask]:
    names = {"id-1": "pi4-a", "id-2": "laptop"}
    found: dict[str, fedavg_lora_pb2.FedavgLoraTask] = {}
    for device, task in METHOD.assign(spec, RoundFacts(number, ["id-1", "id-2"], names=names)).items():
        assert isinstance(task, fedavg_lora_pb2.FedavgLoraTask)
        found[device] = task
    return found


def test_a_device_is_told_its_rank_and_the_scale_that_goes_with_it() -> None:
    found = tasks(job('"pi4-*" = 2'))
    assert (found["id-1"].rank, found["id-1"].scale) == (2, 3.0)
    # What an older agent understands, where it needs to know no more.
    assert (found["id-2"].rank, found["id-2"].scale, found["id-2"].trains) == (0, 0.0, "")


def test_it_is_told_which_matrix_to_train() -> None:
    assert {task.trains for task in tasks(job("", 'aggregation = "ffa"'), 2).values()} == {"left"}
    assert [tasks(job("", 'aggregation = "rolora"'), number)["id-1"].trains for number in (1, 2, 3)] == ["left", "right", "left"]


def test_no_device_trains_more_than_the_job_s_rank() -> None:
    assert "Raise lora.rank" in complaints('"server" = 16')["method.ranks"]


def test_nothing_stands_behind_a_pattern_for_all() -> None:
    assert 'Put "*" last' in complaints('"*" = 4\n"pi4-*" = 2')["method.ranks"]


def test_server_optimisers_need_plain_means() -> None:
    assert complaints('"pi4-*" = 2', 'server_optimizer = "fedadam"').keys() == {"method.ranks"}
    assert complaints("", 'server_optimizer = "fedadam"\naggregation = "exact"').keys() == {"method.aggregation"}
    assert job("", 'server_optimizer = "fedadam"\naggregation = "fedit"').method.server_optimizer == "fedadam"


@pytest.mark.parametrize("ranks", ['"pi4-*" = 0', '"pi4-*" = 2.5', '"pi4-*" = "2"', '"pi4-*" = 2000', '"" = 2'])
def test_what_is_no_rank_is_told_by_the_path_of_the_table(ranks: str) -> None:
    assert complaints(ranks).keys() == {"method.ranks"}


def test_other_methods_have_no_use_for_it() -> None:
    assert complaints('"pi4-*" = 2', 'name = "deft"')["method.ranks"].startswith("Remove it: only fedavg_lora")
    assert "method.aggregation" in complaints("", 'name = "deft"\naggregation = "exact"')


def test_with_fedsa_devices_keep_b_and_send_a_whose_mean_is_a_plain_one() -> None:
    spec = job(method='aggregation = "fedsa"')
    tasks = METHOD.assign(spec, RoundFacts(1, ["a"], names={"a": "a"}))
    task = tasks["a"]
    assert isinstance(task, fedavg_lora_pb2.FedavgLoraTask)
    assert (task.personal, task.trains) == (True, "")
    assert METHOD.fold(spec, 1) is None
    assert not METHOD.assign(job(), RoundFacts(1, ["a"], names={"a": "a"}))["a"].personal  # type: ignore[attr-defined]


def test_with_fedsa_nobody_else_can_measure_and_ranks_are_equal() -> None:
    found = complaints('"a" = 4', 'aggregation = "fedsa"')
    assert set(found) == {"method.ranks"}
    with pytest.raises(JobFileError) as caught:
        jobspec.parse(FILE.format(ranks="", method='aggregation = "fedsa"') + '[evaluation]\nsource = "heldout"\nheldout = "/rows.jsonl"\n')
    (complaint,) = caught.value.complaints
    assert (complaint.path, complaint.allowed) == ("evaluation.source", "devices or none, with aggregation = fedsa")


def test_what_is_no_aggregation_is_told_those_that_there_are() -> None:
    (complaint,) = complaints_of('aggregation = "florist"')
    assert complaint.path == "method.aggregation"
    assert all(choice in complaint.allowed for choice in get_args(AggregationName))


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_a_state_with_a_rest_has_its_rank_and_all_one_scale(name: str) -> None:
    spec = job(method=f'aggregation = "{name}"\nresidual_rank = 40')
    assert (loraranks.residual_rank(spec), loraranks.state_rank(spec)) == (40, 48)
    lora = recipes.recipe(spec).lora
    assert lora.rank == 48 and lora.alpha / lora.rank == loraranks.scale(spec) == 3.0
    assert METHOD.fold(spec, 3) == LoraFold(spec.method.aggregation or "fedit", 48, 3.0, 3, narrower=True, residual_rank=40)  # type: ignore[arg-type]
    assert {(task.rank, task.scale, task.trains) for task in tasks(spec).values()} == {(8, 3.0, "beside-rest")}
    assert loraranks.state_rank(job(method=f'aggregation = "{name}"')) == 72
    assert loraranks.state_rank(job()) == 8 and recipes.recipe(job()).lora.alpha == 24.0


def test_flora_goes_with_unlike_ranks_and_fedex_does_not() -> None:
    spec = job('"pi4-*" = 2', 'aggregation = "flora"')
    assert {name: task.rank for name, task in tasks(spec).items()} == {"id-1": 2, "id-2": 8}
    found = complaints('"pi4-*" = 2', 'aggregation = "fedex"')
    assert found.keys() == {"method.ranks"} and '"flora"' in found["method.ranks"]


def test_who_has_no_rest_is_told_to_remove_its_rank() -> None:
    for method in ("residual_rank = 8", 'aggregation = "exact"\nresidual_rank = 8'):
        found = complaints("", method)
        assert found.keys() == {"method.residual_rank"} and "fedex" in found["method.residual_rank"]
    assert complaints("", 'aggregation = "flora"\nresidual_rank = 0').keys() == {"method.residual_rank"}
    assert complaints("", 'aggregation = "fedex"\nserver_optimizer = "fedadam"').keys() == {"method.aggregation"}
