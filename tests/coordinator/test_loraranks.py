"""Ranks of devices by name, as a job file gives them, and what they exclude."""

from __future__ import annotations

import pytest

from fleetune.coordinator import jobspec, loraranks
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


def complaints(ranks: str = "", method: str = "") -> dict[str, str]:
    with pytest.raises(JobFileError) as caught:
        job(ranks, method)
    return {complaint.path: complaint.remedy for complaint in caught.value.complaints}


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


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_ways_that_change_the_base_are_no_choices_and_those_that_are_are_named(name: str) -> None:
    with pytest.raises(JobFileError) as caught:
        job(method=f'aggregation = "{name}"')
    (complaint,) = caught.value.complaints
    assert complaint.path == "method.aggregation"
    assert all(choice in complaint.allowed for choice in ("exact", "fedit", "zero-pad", "flexlora", "ffa", "rolora", "fedsa"))
