"""The link's figures: learned, told when they change, kept with their age."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fleetune.agent.probe import linkfigures
from fleetune.agent.probe.linkfigures import FRESH_S, SAVE_S, Configured, LinkFigures
from fleetune.v1 import messages_pb2

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def link(folder: Path, clock: Clock, configured: Configured | None = None, coordinator: str = "c:1") -> LinkFigures:
    return LinkFigures(folder, coordinator, configured or Configured(), clock)


def restarted(known: LinkFigures, folder: Path, clock: Clock, coordinator: str = "c:1") -> LinkFigures:
    clock.now_s += SAVE_S
    document = known.due()
    assert document is not None
    known.write(document)
    again = link(folder, clock, coordinator=coordinator)
    again.recall()
    return again


def test_before_anything_was_sent_nothing_is_known(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    assert known.message() == messages_pb2.Link()
    assert known.wants_probe()
    assert known.due() is None


def test_transfers_and_answers_are_told_with_their_age(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.sent(MIB, 1.0)
    known.fetched(4 * MIB, 1.0)
    known.answered(0.02)
    clock.now_s += 30
    told = known.message()
    assert (told.up_bits_per_s, told.down_bits_per_s, told.round_trip_s) == (8 * MIB, 32 * MIB, 0.02)
    assert (told.source, told.age_s) == ("measured", 30)


def test_an_upload_at_its_rate_says_nothing_of_the_link(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.sent(10 * MIB, 1.0)
    known.sent(MIB, 1.0, limit_bytes_per_s=MIB)
    assert known.message().up_bits_per_s == 80 * MIB


def test_a_paced_upload_counts_where_it_met_something_slower(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.sent(MIB, 1.0, limit_bytes_per_s=1.25 * MIB)
    assert known.message().up_bits_per_s == 0
    known.sent(MIB, 1.0, limit_bytes_per_s=8 * MIB)
    assert known.message().up_bits_per_s == 8 * MIB


def test_a_link_that_becomes_far_slower_is_noticed_by_any_transfer(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.sent(10 * MIB, 1.0)
    known.sent(MIB, 1.0, math.inf, True)
    assert known.message().up_bits_per_s < 80 * MIB


def test_a_transfer_whose_time_holds_more_only_raises_what_is_known(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.fetched(MIB, 1.0, math.inf, True)
    known.fetched(MIB, 4.0, math.inf, True)
    assert known.message().down_bits_per_s == 8 * MIB


def test_a_restart_keeps_what_is_known_and_spares_the_probe(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.sent(MIB, 1.0)
    known.answered(0.5)
    again = restarted(known, tmp_path, clock)
    told = again.message()
    assert (told.up_bits_per_s, told.round_trip_s, told.age_s) == (8 * MIB, 0.5, SAVE_S)
    assert not again.wants_probe()
    clock.now_s += FRESH_S
    assert again.wants_probe()


def test_another_coordinator_lies_at_the_end_of_another_link(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.sent(MIB, 1.0)
    assert restarted(known, tmp_path, clock, coordinator="other:1").wants_probe()


def test_a_clock_that_was_set_back_has_the_link_measured_again(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    known.sent(MIB, 1.0)
    clock.now_s -= 3600
    assert known.wants_probe()
    assert known.message().age_s == 0


def test_nothing_is_sent_to_measure_a_link_that_is_paid_by_volume_or_configured(tmp_path: Path, clock: Clock) -> None:
    metered, configured = link(tmp_path, clock), link(tmp_path, clock, Configured(up_bits_per_s=1e6))
    metered.metered = True
    assert not metered.wants_probe()
    assert not configured.wants_probe()


def test_the_owners_word_stands_above_what_was_measured(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock, Configured(up_bits_per_s=1e6))
    known.sent(MIB, 1.0)
    known.fetched(MIB, 1.0)
    told = known.message()
    assert (told.up_bits_per_s, told.down_bits_per_s, told.source, told.age_s) == (1e6, 8 * MIB, "configured", 0)


def test_the_disk_is_not_written_with_each_transfer(tmp_path: Path, clock: Clock) -> None:
    known = link(tmp_path, clock)
    written = 0
    for _ in range(100):
        known.sent(MIB, 1.0)
        written += known.due() is not None
        clock.now_s += SAVE_S / 10
    assert written == 10


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', '{"version": 9, "coordinator": "c:1"}', "9" * 5000])
def test_a_file_that_cannot_be_used_is_left_out(tmp_path: Path, clock: Clock, text: str) -> None:
    (tmp_path / linkfigures.FILE_NAME).write_text(text)
    known = link(tmp_path, clock)
    known.recall()
    assert known.wants_probe()


def test_only_what_has_changed_is_told_again() -> None:
    one = messages_pb2.Link(up_bits_per_s=100.0, source="measured", age_s=5)
    assert linkfigures.differs(None, one)
    assert not linkfigures.differs(one, messages_pb2.Link(up_bits_per_s=104.0, source="measured", age_s=50))
    assert linkfigures.differs(one, messages_pb2.Link(up_bits_per_s=106.0, source="measured"))
    assert linkfigures.differs(one, messages_pb2.Link(up_bits_per_s=100.0, down_bits_per_s=1.0, source="measured"))
    assert linkfigures.differs(one, messages_pb2.Link(up_bits_per_s=100.0, source="measured", metered=True))
