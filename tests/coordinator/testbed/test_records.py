"""Reading a run's record: whole, cut off, or none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.coordinator.testbed import records
from fleetune.coordinator.testbed.records import RecordError
from support import testbed_runs as runs

A_RUN = [
    runs.began([runs.device("attic")]),
    runs.sampled(1, {"attic": runs.sample(2.5, 700)}, stages={"attic": "training"}),
    runs.acted(2, "attic", "kill", "killed"),
    runs.ended(9, runs.job_report([]), devices=["attic"], notes=["all is well"]),
    runs.checked(12, [{"rule": "link_differs", "round_number": 2, "message": "best leads elsewhere"}]),
]


def parsed(content: bytes) -> records.Record:
    return records.parse(content, "run.jsonl")


def test_a_record_is_read_back_as_it_was_told() -> None:
    record = parsed(runs.text(A_RUN))
    assert record.began.backend == "netns"
    assert record.samples[0].members["attic"].cpu_s == 2.5
    assert record.samples[0].stages == {"attic": "training"}
    assert (record.acts[0].member, record.acts[0].act) == ("attic", "kill")
    assert record.ended is not None
    assert record.ended.notes == ["all is well"]
    assert record.checked is not None
    assert record.checked.history[0]["rule"] == "link_differs"
    assert record.notes == ()


@pytest.mark.parametrize("missing", [1, 5, 60, 200])
def test_a_last_line_that_was_cut_off_is_left_out_and_said(missing: int) -> None:
    record = parsed(runs.text(A_RUN[:2])[:-missing])
    whole = missing == 1  # the newline alone
    assert len(record.samples) == int(whole)
    assert ("the last line of the record is cut off; the report goes without it" in record.notes) != whole


def test_a_cut_within_a_letter_is_no_trouble_either() -> None:
    content = runs.text([*A_RUN[:2], runs.acted(2, "attic", "kill", "été")])
    record = parsed(content[: content.rindex("é".encode()) + 1])
    assert record.acts == ()


def test_a_run_without_an_end_says_so() -> None:
    record = parsed(runs.text(A_RUN[:3]))
    assert record.ended is None
    assert any("cut off" in note for note in record.notes)
    assert record.end_unix_s == runs.START_UNIX_S + 2


def test_a_broken_line_in_the_middle_is_named() -> None:
    content = runs.text(A_RUN[:1]) + b'{"what": "sam\n' + runs.text(A_RUN[1:])
    with pytest.raises(RecordError, match=r"run\.jsonl, line 2: no JSON"):
        parsed(content)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_record_is_no_record(content: bytes) -> None:
    with pytest.raises(RecordError, match="is empty"):
        parsed(content)


def test_a_record_cut_within_its_first_line_is_no_record() -> None:
    with pytest.raises(RecordError, match="line 1"):
        parsed(runs.text(A_RUN)[:40])


def test_some_other_file_of_json_lines_is_no_record() -> None:
    with pytest.raises(RecordError, match="the first line of a record tells what began, not 'sampled'"):
        parsed(runs.text(A_RUN[1:]))


def test_two_runs_in_one_file_are_not_mixed_up() -> None:
    with pytest.raises(RecordError, match="line 6: a second run begins here"):
        parsed(runs.text(A_RUN + A_RUN))


@pytest.mark.parametrize("line", [b"[]", b"7", b'"x"', b"{}"])
def test_a_line_that_is_no_object_is_named(line: bytes) -> None:
    with pytest.raises(RecordError, match="line 2"):
        parsed(runs.text(A_RUN[:1]) + line + b"\n" + runs.text(A_RUN[1:2]))


def test_a_line_without_its_time_is_named() -> None:
    with pytest.raises(RecordError, match="line 2: at_unix_s is None"):
        parsed(runs.text([A_RUN[0], {"what": "acted", "member": "attic", "act": "kill"}, A_RUN[1]]))


def test_lines_of_sorts_that_a_later_version_adds_are_left_out_and_counted() -> None:
    record = parsed(runs.text([A_RUN[0], {"what": "heard", "at_unix_s": 1.0}, *A_RUN[1:]]))
    assert record.notes == ("1 lines of an unknown sort ('heard') are left out",)


def test_figures_that_a_backend_cannot_tell_are_none_and_not_zero() -> None:
    record = parsed(runs.text([A_RUN[0], runs.sampled(1, {"attic": {"cpu_s": None, "sent_bytes": "many", "memory_bytes": True}})]))
    sample = record.samples[0].members["attic"]
    assert (sample.cpu_s, sample.sent_bytes, sample.memory_bytes, sample.energy_j) == (None, None, None, None)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        records.read(tmp_path / "run.jsonl")


def test_time_begins_when_the_job_was_handed_in_and_ends_with_it() -> None:
    report = {**runs.job_report([]), "submitted_unix_s": runs.START_UNIX_S - 1.5, "ended_unix_s": runs.START_UNIX_S + 8}
    record = parsed(runs.text([A_RUN[0], runs.ended(9, report)]))
    assert record.origin_unix_s == runs.START_UNIX_S - 1.5
    assert record.end_unix_s == runs.START_UNIX_S + 8
