"""Jobs of falling ranks: what their file may say, and what it comes to."""

from __future__ import annotations

import pytest

from fleetune.coordinator import jobspec
from fleetune.coordinator.jobspec import JobFileError
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.fedara import METHOD
from fleetune.coordinator.rounds.job import plan_of
from fleetune.methods.v1 import fedara_pb2

JOB = """\
name = "ranked"
[model]
base = "org/name"
[task]
kind = "text-classification"
labels = ["no", "yes"]
[lora]
rank = 8
alpha = 64
[data]
name = "rows"
[rounds]
count = 10
[method]
name = "fedara"
"""


def complaints_of(text: str) -> dict[str, tuple[str, str]]:
    with pytest.raises(JobFileError) as caught:
        jobspec.parse(text)
    return {complaint.path: (complaint.allowed, complaint.remedy) for complaint in caught.value.complaints}


def test_the_usual_budget_goes_to_a_quarter() -> None:
    plan = plan_of("job", jobspec.parse(JOB), 15.0).ranking
    assert plan is not None
    assert (plan.end, plan.warm_share, plan.final_share, plan.arbitration) == (0.25, 0.1, 0.3, "score")
    assert plan_of("job", jobspec.parse(JOB.replace("fedara", "fedavg_lora")), 15.0).ranking is None


def test_a_task_says_the_ranks_and_the_scale_that_never_changes() -> None:
    spec = jobspec.parse(JOB + "orthogonality = 0.2\n")
    tasks = METHOD.assign(spec, RoundFacts(3, ["a", "b"], ranks={"query": 2}))
    assert set(tasks) == {"a", "b"}
    task = tasks["a"]
    assert isinstance(task, fedara_pb2.FedaraTask)
    assert (dict(task.ranks), task.scale, task.orthogonality) == ({"query": 2}, 8.0, 0.2)
    assert METHOD.kinds(spec) == {"delta"}


def test_a_threshold_is_for_votes() -> None:
    assert "nothing, for arbitration" in complaints_of(JOB + "vote_threshold = 0.7\n")["method.vote_threshold"][0]
    assert jobspec.parse(JOB + 'vote_threshold = 0.7\narbitration = "vote"\n').method.vote_threshold == 0.7


def test_the_rounds_before_and_after_the_fall_are_all_rounds_at_the_most() -> None:
    assert complaints_of(JOB + "warm_share = 0.8\n")["method.warm_share"][0] == "at most 0.7"
    assert complaints_of(JOB + "warm_share = 0.8\nfinal_share = 0.5\n")["method.final_share"][0] == "at most 0.2"
    jobspec.parse(JOB + "warm_share = 0.7\n")


def test_it_starts_from_no_adapter() -> None:
    assert complaints_of(JOB.replace("alpha = 64", 'init_adapter = "/some/folder"'))["lora.init_adapter"][0] == "nothing, for fedara"


@pytest.mark.parametrize(
    "line", ["ranks_end = 0.5", "warm_share = 0.2", "final_share = 0.2", 'arbitration = "vote"', "orthogonality = 0.1"]
)
def test_its_settings_are_for_no_other_method(line: str) -> None:
    (found,) = complaints_of(JOB.replace("fedara", "fedavg_lora") + line + "\n").values()
    assert found == ("nothing, for fedavg_lora", "Remove it: only fedara has a use for it.")


@pytest.mark.parametrize("line", ["ranks_end = 0", "ranks_end = 1.5", "warm_share = -0.1", "vote_threshold = 0", 'arbitration = "dice"'])
def test_values_that_mean_nothing_are_refused(line: str) -> None:
    assert complaints_of(JOB + line + "\n")
