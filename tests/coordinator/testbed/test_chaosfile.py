"""chaos.toml: what it makes for a testbed, and that every mistake in it is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.complaints import ComplaintsError
from fleetune.coordinator.testbed import chaosfile, testbedfile
from fleetune.coordinator.testbed.backend import FaultKind

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
SPEC = testbedfile.parse('[[device]]\nkind = "pi4"\ncount = 2\n[[device]]\nkind = "laptop"\nname = "desk"\n')


def _complaints(text: str, can: frozenset[FaultKind] = frozenset(chaosfile.KINDS)) -> dict[str, str]:
    with pytest.raises(ComplaintsError) as caught:
        chaosfile.parse(text, SPEC, can, "process")
    return {complaint.path: complaint.sentence() for complaint in caught.value.complaints}


@pytest.mark.parametrize(
    ("target", "members"),
    [("pi4-1", ("pi4-1",)), ("pi4", ("pi4-1", "pi4-2")), ("laptop", ("desk",)), ("any", SPEC.names), ("coordinator", ("coordinator",))],
)
def test_a_target_is_a_device_a_kind_any_or_the_coordinator(target: str, members: tuple[str, ...]) -> None:
    chaos = chaosfile.parse(f'[[fault]]\nkind = "kill"\ntarget = "{target}"\nat_s = 1\n', SPEC)
    assert tuple(chaosfile.candidates(chaos.faults[0], SPEC)) == members


def test_all_mistakes_are_told_at_once_each_with_its_path() -> None:
    found = _complaints(
        'sed = 3\n[[fault]]\nkind = "explode"\ntarget = "pi9"\nat_s = 1\n[[fault]]\nkind = "throttle"\ntarget = "coordinator"\n'
        '[[fault]]\nkind = "kill"\ntarget = "any"\nat_s = 1\nevery_s = 2\nto_mbit = 3\n'
        '[[fault]]\nkind = "out_of_memory"\ntarget = "desk"\nevery_s = 5\nfor_s = 3\n'
    )
    assert set(found) == {
        "sed", "fault[1].kind", "fault[1].target", "fault[2].target", "fault[2].at_s", "fault[2].to_mbit", "fault[3].at_s",
        "fault[3].until_s", "fault[3].to_mbit", "fault[4].until_s", "fault[4].for_s",
    }  # fmt: skip
    assert 'Did you mean "pi4"?' in found["fault[1].target"]


def test_a_fault_that_the_backend_cannot_make_is_refused_by_name() -> None:
    found = _complaints('[[fault]]\nkind = "cut"\ntarget = "any"\nat_s = 1\n', frozenset(("kill", "pause")))
    assert "The process backend cannot do it" in found["fault[1].kind"]
    assert "kill, pause" in found["fault[1].kind"]


def test_a_file_without_a_fault_is_a_mistake() -> None:
    assert "fault" in _complaints("seed = 3\n")


def test_the_shipped_chaos_fits_the_shipped_testbed() -> None:
    spec = testbedfile.load(DEPLOY / "testbed.toml")
    chaos = chaosfile.load(DEPLOY / "chaos.toml", spec, frozenset(chaosfile.KINDS), "netns")
    assert {fault.kind for fault in chaos.faults} == set(chaosfile.KINDS)
