"""Which triplets stay: by the budget, by the devices' scores, the same whatever the order, and none comes back."""

from __future__ import annotations

import itertools
import json
import math
import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.domain import Blob, FoldOutcome, Prepared, RankSettings, RoundEntry, TaskEntry, Update
from fleetune.coordinator.methods import fedara
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.rounds import ranking
from fleetune.coordinator.store import records
from fleetune.errors import WireError
from fleetune.methods.v1 import fedara_pb2
from support.machines import Desk, blob, devices, only

RANKS = {"a": 2, "b": 3, "c": 1}
SETTINGS = RankSettings(first=6, warm_share=0.0, final_share=0.0, end=0.5)


def packed(**scores: list[float]) -> str:
    return ranking.packed({name: struct.pack(f"<{len(values)}e", *values) for name, values in scores.items()})


def entry(*scores: str, number: int = 1, ranks: dict[str, int] = RANKS, weights: tuple[int, ...] = ()) -> RoundEntry:
    found = RoundEntry(number, "folding", 0.0, ranks=dict(ranks))
    for place, text in enumerate(scores):
        update = Update(Blob("0" * 64, 1), weights[place] if weights else 1, scores=text)
        found.tasks[f"t{place}"] = TaskEntry(f"t{place}", f"d{place}", f"d{place}", "train", 1, "done", update=update)
    return found


def test_scores_come_back_as_they_were_packed() -> None:
    text = packed(c=[5.0], a=[1.0, 2.0], b=[0.5, 0.25, 4.0])
    assert ranking.unpacked(RANKS, text) == {"a": (1.0, 2.0), "b": (0.5, 0.25, 4.0), "c": (5.0,)}


def test_the_best_by_mean_score_stay_as_many_as_the_budget_has() -> None:
    one, other = packed(a=[1.0, 0.0], b=[0.0, 0.0, 2.0], c=[3.0]), packed(a=[1.0, 0.0], b=[0.0, 4.0, 2.0], c=[0.0])
    alive = ranking.decided(SETTINGS, 1, entry(one, other))
    assert alive == {"a": "00", "b": "011", "c": "1"}
    assert ranking.left(alive) == {"b": 2, "c": 1}


def test_rows_weigh_and_the_order_of_the_devices_does_not() -> None:
    one, other = packed(a=[4.0, 4.0], b=[0.0, 0.0, 0.0], c=[0.0]), packed(a=[0.0, 0.0], b=[2.0, 2.0, 2.0], c=[0.0])
    assert ranking.left(ranking.decided(SETTINGS, 1, entry(one, other, weights=(1, 9)))) == {"b": 3}
    assert ranking.decided(SETTINGS, 1, entry(one, other, weights=(2, 3))) == ranking.decided(
        SETTINGS, 1, entry(other, one, weights=(3, 2))
    )


def test_by_vote_counts_what_devices_have_among_their_own_best() -> None:
    # One device's huge score outweighs two others' in the mean, not in the vote.
    loud, quiet = packed(a=[9.0, 0.0], b=[0.0, 0.0, 0.0], c=[8.0]), packed(a=[0.0, 0.0], b=[0.2, 0.2, 0.2], c=[0.0])
    of = entry(loud, quiet, quiet)
    assert ranking.left(ranking.decided(SETTINGS, 1, of)) == {"a": 1, "b": 1, "c": 1}
    by_vote = RankSettings(first=6, warm_share=0.0, final_share=0.0, end=0.5, arbitration="vote")
    assert ranking.left(ranking.decided(by_vote, 1, of)) == {"b": 3}


def test_where_nobody_could_score_nothing_goes_until_somebody_can() -> None:
    nothing = packed(a=[0.0, 0.0], b=[0.0, 0.0, 0.0], c=[0.0])
    assert ranking.left(ranking.decided(SETTINGS, 1, entry(nothing))) == RANKS
    assert ranking.left(ranking.decided(SETTINGS, 1, entry())) == RANKS
    some = packed(a=[1.0, 2.0], b=[0.0, 0.0, 0.0], c=[0.0])
    assert ranking.left(ranking.decided(SETTINGS, 1, entry(nothing, some)))["a"] == 2


@given(
    rounds=st.integers(1, 25), end=st.floats(0.01, 1), warm=st.floats(0, 0.5), final=st.floats(0, 0.5), seed=st.integers(0, 99),
    arbitration=st.sampled_from(["score", "vote"]),
)  # fmt: skip
def test_ranks_meet_the_budget_after_every_round_and_a_dead_triplet_stays_dead(
    rounds: int, end: float, warm: float, final: float, seed: int, arbitration: str
) -> None:
    draw = random.Random(seed)
    ranks = {f"m{number}": draw.randint(1, 8) for number in range(5)}
    first = sum(ranks.values())
    settings = RankSettings(end, warm, final, "vote" if arbitration == "vote" else "score", first=first)
    budget = ranking.budget(settings, rounds)
    assert budget.at(rounds) == (max(1, round(end * first)) if rounds > budget.warm_rounds else first)
    for number in range(1, rounds + 1):
        found = [packed(**{name: [draw.random() + 0.01 for _ in range(rank)] for name, rank in ranks.items()}) for _ in range(3)]
        alive = ranking.decided(settings, rounds, entry(*found, number=number, ranks=ranks))
        # A decision is only over what the round began with: what went before is not named in it.
        assert {name: len(mask) for name, mask in alive.items()} == ranks
        ranks = ranking.left(alive)
        assert sum(ranks.values()) == budget.at(number)
        assert all(rank > 0 for rank in ranks.values())


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"a": b"\0" * 4, "b": b"\0" * 6}, "no scores of 'c'"),
        ({"a": b"\0" * 4, "b": b"\0" * 6, "c": b"\0" * 2, "evil": b""}, "scores of 'evil'"),
        ({"a": b"\0" * 2, "b": b"\0" * 6, "c": b"\0" * 2}, "2 bytes of scores of 'a'; 2 for each of its 2 triplets"),
        ({"a": b"\0" * 4, "b": b"\0" * 6, "c": struct.pack("<e", math.nan)}, "'c' with nan"),
        ({"a": b"\0" * 4, "b": b"\0" * 6, "c": struct.pack("<e", math.inf)}, "'c' with inf"),
        ({"a": struct.pack("<2e", 1.0, -1.0), "b": b"\0" * 6, "c": b"\0" * 2}, "'a' with -1"),
    ],
)
def test_scores_that_are_none_of_the_rounds_are_refused(scores: dict[str, bytes], said: str) -> None:
    assert said in ranking.objection(RANKS, scores)


def test_scores_of_the_round_are_taken() -> None:
    assert ranking.objection(RANKS, {"a": b"\0" * 4, "b": b"\0" * 6, "c": b"\0" * 2}) == ""


def test_a_report_that_is_none_or_names_a_module_twice_is_refused() -> None:
    twice = fedara_pb2.FedaraReport(scores=[fedara_pb2.TripletScores(module="a"), fedara_pb2.TripletScores(module="a")])
    with pytest.raises(WireError, match="scores a module twice"):
        fedara.scores(twice.SerializeToString())
    with pytest.raises(WireError, match="cannot be read"):
        fedara.scores(b"\xff\xff\xff")


# --------------------------------------------------------------------------------------------------------- in the round machine


class RankDesk(Desk):
    """A job whose six triplets fall to three."""

    def __init__(self, rounds: int = 3) -> None:
        super().__init__(rounds=rounds, ranking=RankSettings(end=0.5, warm_share=0.0, final_share=0.0))

    def prepare(self) -> list[m.Command]:
        return self.do(m.Started()) + self.do(m.PreparedEvent(Prepared(blob("state 0"), "t" * 64, ranks=dict(RANKS))))

    def scored(self, name: str, seed: int) -> list[m.Command]:
        assert self.machine.round is not None
        draw = random.Random(seed)
        text = packed(**{module: [draw.random() for _ in range(rank)] for module, rank in self.machine.round.ranks.items()})
        update = Update(blob(f"{name} {self.machine.round.number}"), 1, scores=text)
        return self.do(m.UpdateArrived(self.task(name), update))

    def cut(self, *evaluators: str) -> list[m.Command]:
        assert self.machine.round is not None
        number = self.machine.round.number
        outcome = FoldOutcome(blob(f"state {number}"), adapter=blob(f"adapter {number}"), trainables_digest=f"{number}" * 64)
        return self.do(m.Folded(number, outcome, devices(*evaluators)))


def test_a_round_is_folded_with_its_decision_and_the_next_begins_with_what_is_left() -> None:
    desk = RankDesk()
    assert [task.trainables_digest for task in desk.open("a", "b")] == ["", ""]
    assert desk.machine.ranks_of("train") == RANKS
    desk.scored("a", 1)
    (fold,) = only(desk.scored("b", 2), m.Fold)
    assert {name: len(mask) for name, mask in fold.alive.items()} == RANKS
    (commit,) = only(desk.cut(), m.CommitRound)
    assert commit.entry.alive == fold.alive
    assert commit.entry.published == blob("adapter 1")
    tasks = desk.open("a", "b")
    assert [task.trainables_digest for task in tasks] == ["1" * 64] * 2
    assert desk.machine.ranks_of("train") == ranking.left(fold.alive)


def test_who_measures_gets_the_ranks_and_the_digest_after_the_fold() -> None:
    desk = RankDesk(rounds=1)
    desk.machine.plan = replace(desk.machine.plan, evaluation="devices")
    desk.open("a")
    (fold,) = only(desk.scored("a", 1), m.Fold)
    (task,) = only(desk.cut("a"), m.SendTask)
    assert (task.kind, task.trainables_digest) == ("evaluate", "1" * 64)
    assert desk.machine.ranks_of("evaluate") == ranking.left(fold.alive)
    assert sum(ranking.left(fold.alive).values()) == 3


def test_a_restart_in_the_fold_drops_the_same_triplets() -> None:
    desk = RankDesk()
    desk.open("a", "b")
    desk.scored("a", 1)
    (fold,) = only(desk.scored("b", 2), m.Fold)
    text = records.dump_machine(desk.machine)
    desk.machine = records.load_machine(text)
    json.loads(text)
    (again,) = only(desk.do(m.Restarted()), m.Fold)
    assert again == fold


def test_an_update_that_was_damaged_takes_the_decision_back() -> None:
    desk = RankDesk()
    desk.open("a", "b")
    desk.scored("a", 1)
    desk.scored("b", 2)
    assert desk.machine.round is not None
    task = desk.machine.round.tasks[desk.task("b")]
    desk.do(m.UpdateDamaged(task.task_id, task.lease, True))
    assert desk.machine.round.alive == {}
    (fold,) = only(desk.scored("b", 3), m.Fold)
    assert fold.alive


def test_over_all_rounds_the_ranks_only_fall() -> None:
    desk = RankDesk(rounds=6)
    left: list[dict[str, int]] = []
    for number in range(6):
        desk.open("a", "b")
        desk.scored("a", number)
        desk.scored("b", 10 + number)
        desk.cut()
        left.append(dict(desk.machine.ranks))
    assert all(
        set(after) <= set(before) and all(after[name] <= before[name] for name in after) for before, after in itertools.pairwise(left)
    )
    assert sum(left[-1].values()) == 3
