"""Other programs' load over the last half minute."""

from __future__ import annotations

from fleetune.agent.probe.idle import WINDOW_S, OthersLoad, Sample, sample


def at(second: float, busy_s: float, own_s: float, cores: int = 2) -> Sample:
    return Sample(second, busy_s, second * cores, own_s)


def test_load_is_unknown_until_it_was_measured() -> None:
    load = OthersLoad()
    assert load.add(at(0, 0, 0)) is None
    assert load.add(at(1, 2, 0)) is None
    assert load.add(at(5, 5, 0)) == 50.0


def test_the_agent_s_own_training_is_not_others() -> None:
    load = OthersLoad()
    load.add(at(0, 0, 0))
    assert load.add(at(10, 20, 19)) == 5.0


def test_clocks_that_disagree_by_a_tick_give_no_negative_load() -> None:
    load = OthersLoad()
    load.add(at(0, 0, 0))
    assert load.add(at(10, 9.9, 10)) == 0.0


def test_what_was_before_the_window_is_forgotten() -> None:
    load = OthersLoad()
    load.add(at(0, 0, 0))
    load.add(at(10, 20, 0))
    readings = [load.add(at(second, 20, 0)) for second in range(15, 46, 5)]
    assert readings[0] is not None
    assert readings[0] > 0
    assert readings[-1] == 0.0
    assert WINDOW_S == 30.0


def test_a_real_sample_counts_this_process() -> None:
    taken = sample(1.0)
    assert taken.at_s == 1.0
    assert taken.own_s > 0
    assert 0 < taken.busy_s <= taken.possible_s
