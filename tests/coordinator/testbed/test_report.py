"""The files of a report: JSON, a page that stands alone, and a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import drawing, htmlpage, records, runfigures, timeline
from fleetune.coordinator.testbed.report import FORMAT, write_report
from support import testbed_runs as runs
from support.testbed_runs import Line

SIX = {"pi4-1": "pi4", "pi4-2": "pi4", "pi5-1": "pi5", "orin-nano-1": "orin-nano", "laptop-1": "laptop", "pi4-512mb": "pi4"}
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('1')</script>\"&\u202e\x00\x1b[31m"


def played() -> list[Line]:
    return runs.played(SIX, rounds=3, small="pi4-512mb")


def page_of(lines: list[Line]) -> str:
    record = records.parse(runs.text(lines), "run.jsonl")
    return htmlpage.page(runfigures.run_figures(record), record)


def picture_of(lines: list[Line]) -> str:
    return timeline.timeline(runfigures.run_figures(records.parse(runs.text(lines), "run.jsonl")))


def hostile() -> list[Line]:
    failed = runs.task(HOSTILE, "failed", failure={"kind": HOSTILE, "stage": HOSTILE, "message": HOSTILE, "traceback": ""})
    report = runs.job_report([runs.committed(1, 0, 5, {"accuracy": 0.5}, [failed])], message=HOSTILE)
    report.update(name=HOSTILE, method=HOSTILE, base=HOSTILE, job_id=HOSTILE)
    looks = [
        runs.sampled(second, {HOSTILE: runs.sample(second, second)}, stages={HOSTILE: HOSTILE}, phase=HOSTILE, round_number=1)
        for second in range(6)
    ]
    acts = [runs.acted(2, HOSTILE, HOSTILE, HOSTILE), runs.acted(3, HOSTILE, "kill", HOSTILE)]
    began = runs.began([runs.device(HOSTILE, HOSTILE)], name=HOSTILE)
    began["job"] = HOSTILE
    broken: Line = {"rule": HOSTILE, "round_number": 1, "message": HOSTILE}
    return [began, *looks, *acts, runs.ended(6, report, devices=[HOSTILE], status=HOSTILE, notes=[HOSTILE]), runs.checked(7, [broken])]


EMPTY = [runs.began([])]
ALONE = [runs.began([runs.device("attic")])]
CUT = played()[:40]
FAILED = [
    *ALONE,
    runs.sampled(1, {"attic": runs.sample()}),
    runs.ended(2, runs.job_report([], state="failed", message="No base."), status="failed"),
]
NEVER_ONLINE = [
    *ALONE,
    *[runs.sampled(second, {}, lives={"attic": "missing"}) for second in range(5)],
    runs.ended(5, runs.job_report([], state="failed")),
]
RUNS = {"played": played(), "hostile": hostile(), "empty": EMPTY, "alone": ALONE, "cut": CUT, "failed": FAILED, "never": NEVER_ONLINE}


@pytest.mark.parametrize("name", RUNS)
def test_page_and_picture_are_well_formed(name: str) -> None:
    ElementTree.fromstring(page_of(RUNS[name]))
    assert ElementTree.fromstring(picture_of(RUNS[name])).tag == f"{SVG}svg"


def test_nothing_of_the_record_becomes_markup() -> None:
    page = page_of(hostile())
    assert "<script" not in page
    assert "\x00" not in page
    assert "\x1b" not in page
    texts = [element.text or "" for element in ElementTree.fromstring(page).iter("td")]
    assert any("<script>" in text for text in texts)


def test_what_turns_the_reading_direction_is_shown_as_a_stand_in() -> None:
    assert drawing.safe("a\u202eb\u2066c") == "a\ufffdb\ufffdc"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = page_of(played())
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|\bsrc=|\bhref=", page)
    assert not re.search(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}


def test_a_page_without_a_measured_round_says_so() -> None:
    assert page_of(FAILED).count("No round was measured.") == 2
    assert "No base." in page_of(FAILED)


def test_of_a_run_that_goes_on_the_page_claims_no_rounds() -> None:
    page = page_of(CUT)
    assert "the run goes on or was cut off" in page
    assert "rounds committed" not in page


def test_the_page_says_of_a_device_that_never_came_that_it_never_came() -> None:
    assert "it never came online" in page_of(NEVER_ONLINE)


def test_ids_in_a_page_are_used_once() -> None:
    ids = re.findall(r'\bid="([^"]+)"', page_of(played()))
    assert len(ids) == len(set(ids))


def test_the_picture_has_a_lane_for_each_member_and_a_letter_for_each_sort_of_fault() -> None:
    root = ElementTree.fromstring(picture_of(played()))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert [text for text in texts if text in {*SIX, "coordinator"}] == [*SIX, "coordinator"]
    assert {"K", "P", "M"} <= set(texts)
    assert "trains" in texts


def test_the_picture_stays_within_its_frame() -> None:
    many = {f"board-{number}": "pi5" for number in range(30)}
    root = ElementTree.fromstring(picture_of(runs.played(many, rounds=2)))
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    for box in root.iter(f"{SVG}rect"):
        if "x" in box.attrib and "transform" not in box.attrib:
            assert float(box.attrib["x"]) + float(box.attrib["width"]) <= width + 0.1
    assert all(float(text.attrib["y"]) <= height for text in root.iter(f"{SVG}text"))


def test_a_day_of_samples_is_a_picture_of_bounded_size() -> None:
    looks = [runs.sampled(second, {"attic": runs.sample()}, stages={"attic": "training"} if second % 2 else {}) for second in range(5000)]
    assert len(picture_of([*ALONE, *looks])) < 400_000


def test_the_report_is_three_files_that_replace_older_ones(tmp_path: Path) -> None:
    record = runs.write(tmp_path, played())
    out = tmp_path / "deep" / "report"
    write_report(record, out)
    paths = write_report(record, out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "timeline.svg"]
    document = json.loads(paths.json.read_text(encoding="utf-8"))
    assert document["format"] == FORMAT
    assert [device["device"] for device in document["devices"]] == list(SIX)
    assert document["devices"][5]["failure"].startswith("out of memory")
    assert document["robustness"]["rounds_committed"] == 3
    for device in document["devices"]:
        # From the first look on, each second is at something.
        assert sum(device["seconds"].values()) == pytest.approx(document["wall_s"], abs=1e-6)
    assert paths.timeline.read_text(encoding="utf-8").startswith("<svg")


def test_a_name_that_no_encoding_has_does_not_stop_the_report(tmp_path: Path) -> None:
    odd = "\udc80pi"
    lines = [runs.began([runs.device(odd)]), runs.sampled(1, {odd: runs.sample()})]
    record = tmp_path / "run.jsonl"
    record.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    ElementTree.fromstring(write_report(record, tmp_path).html.read_text(encoding="utf-8"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    record = runs.write(tmp_path, ALONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written to"):
        write_report(record, tmp_path / "file" / "report")
