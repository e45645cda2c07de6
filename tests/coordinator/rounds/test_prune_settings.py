"""What a job file says of pruning reaches the arms: the bandit's ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.coordinator import jobspec
from fleetune.coordinator.rounds.job import prune_settings

EXAMPLE = Path(__file__).resolve().parents[3] / "deploy" / "config" / "jobs" / "fedspine.toml"


@pytest.mark.parametrize(
    ("rank", "method", "ranks"),
    [
        (16, "", (8, 16)),
        (5, "", (3, 5)),
        (1, "", (1, 1)),
        (16, "rank_min = 2", (2, 16)),
        (16, "rank_min = 16", (16, 16)),
    ],
)
def test_the_bandit_takes_ranks_from_half_of_the_highest_unless_told(rank: int, method: str, ranks: tuple[int, int]) -> None:
    toml = EXAMPLE.read_text("utf-8")
    assert "\nrank = 16 " in toml
    toml = toml.replace("\nrank = 16 ", f"\nrank = {rank} ").replace("[method]\n", f"[method]\n{method}\n")
    settings = prune_settings(jobspec.parse(toml))
    assert (settings.rank_min, settings.rank_max) == ranks


def test_a_lowest_rank_above_the_highest_is_a_mistake() -> None:
    toml = EXAMPLE.read_text("utf-8").replace("[method]\n", "[method]\nrank_min = 17\n")
    with pytest.raises(jobspec.JobFileError) as caught:
        jobspec.parse(toml)
    (complaint,) = caught.value.complaints
    assert (complaint.path, complaint.allowed) == ("method.rank_min", "0 to 16, which is lora.rank")
