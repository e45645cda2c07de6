"""The schedule of faults: a pure function, in which faults of one member never overlap and each is undone."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fleetune.coordinator.testbed import chaosfile, schedule, testbedfile
from fleetune.coordinator.testbed.chaosfile import Chaos, Fault

SPEC = testbedfile.parse('[[device]]\nkind = "pi4"\ncount = 2\n[[device]]\nkind = "laptop"\n')

_at = st.floats(0, 300, allow_nan=False)


@st.composite
def _faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(chaosfile.KINDS))
    target = draw(st.sampled_from((*SPEC.names, "pi4", "any", "coordinator")))
    once = draw(st.booleans())
    return Fault(
        kind=kind,
        target=target,
        at_s=draw(_at) if once else None,
        every_s=None if once else draw(st.floats(1, 100)),
        until_s=0.0 if once else draw(_at),
        for_s=0.0 if kind == "out_of_memory" else draw(st.floats(0.1, 60)),
        to_mbit=draw(st.floats(0.05, 100)),
    )


_chaos = st.builds(Chaos, st.integers(0, 2**32 - 1), st.lists(_faults(), min_size=1, max_size=8).map(tuple))


@given(_chaos)
def test_the_same_file_gives_the_same_acts(chaos: Chaos) -> None:
    assert schedule.acts(chaos, SPEC) == schedule.acts(chaos, SPEC)


@given(_chaos)
def test_acts_stand_in_the_order_of_time(chaos: Chaos) -> None:
    times = [act.at_s for act in schedule.acts(chaos, SPEC)]
    assert times == sorted(times)


@given(_chaos)
def test_each_fault_is_undone_before_the_next_of_the_same_member(chaos: Chaos) -> None:
    acts = schedule.acts(chaos, SPEC)
    for member in {act.member for act in acts}:
        own = [act for act in acts if act.member == member]
        undone = None
        for act in own:
            if undone is not None:
                assert act.verb == undone
                undone = None
            else:
                assert act.verb in chaosfile.KINDS
                undone = next((end for kind, end in schedule.UNDONE.items() if kind == act.verb), None)
        assert undone is None
        begins = [act for act in own if act.verb in chaosfile.KINDS]
        assert all(later.at_s >= earlier.at_s + schedule.GAP_S for earlier, later in pairwise(begins))


@given(_chaos)
def test_no_fault_begins_before_its_time_and_only_its_targets_are_hit(chaos: Chaos) -> None:
    hit = {act.member for act in schedule.acts(chaos, SPEC)}
    allowed = {member for fault in chaos.faults for member in chaosfile.candidates(fault, SPEC)}
    assert hit <= allowed
    once = [fault for fault in chaos.faults if fault.at_s is not None]
    if once and len(once) == len(chaos.faults):
        assert schedule.acts(chaos, SPEC)[0].at_s >= round(min(fault.at_s or 0.0 for fault in once), 3)


@given(_chaos, _faults())
def test_a_fault_added_at_the_end_moves_no_other_member(chaos: Chaos, added: Fault) -> None:
    longer = Chaos(chaos.seed, (*chaos.faults, added))
    touched = set(chaosfile.candidates(added, SPEC))
    before = [act for act in schedule.acts(chaos, SPEC) if act.member not in touched]
    assert before == [act for act in schedule.acts(longer, SPEC) if act.member not in touched]


def test_faults_at_a_mean_interval_come_that_often() -> None:
    chaos = chaosfile.parse('[[fault]]\nkind = "kill"\ntarget = "any"\nevery_s = 10\nuntil_s = 10000\nfor_s = 0.1\n', SPEC)
    kills = [act for act in schedule.acts(chaos, SPEC) if act.verb == "kill"]
    assert 900 < len(kills) < 1100
    assert {act.member for act in kills} == set(SPEC.names)


def test_another_seed_gives_other_acts() -> None:
    text = '[[fault]]\nkind = "kill"\ntarget = "any"\nevery_s = 10\nuntil_s = 1000\n'
    assert schedule.acts(chaosfile.parse(f"seed = 1\n{text}", SPEC), SPEC) != schedule.acts(
        chaosfile.parse(f"seed = 2\n{text}", SPEC), SPEC
    )
