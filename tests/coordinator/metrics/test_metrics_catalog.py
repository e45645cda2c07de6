"""The rows of the catalog keep Prometheus' conventions, and the reference page has all of them."""

from __future__ import annotations

import re
from pathlib import Path

from fleetune.coordinator.metrics.catalog import CATALOG, reference

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
ABBREVIATED = re.compile(r"_(s|sec|ms|millis|mb|mib|kib|kb|pct|percent|temp)(_|$)")


def test_names_are_lower_case_begin_with_the_product_and_are_unique() -> None:
    names = [row.name for row in CATALOG]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"fleetune(_[a-z]+)+", name) for name in names)


def test_counters_alone_end_in_total() -> None:
    assert [row.name for row in CATALOG if (row.kind == "counter") != row.name.endswith("_total")] == []


def test_units_are_whole_words_and_base_units() -> None:
    assert [row.name for row in CATALOG if ABBREVIATED.search(row.name.removesuffix("_total"))] == []


def test_every_help_is_a_sentence_on_one_line() -> None:
    assert [row.name for row in CATALOG if not row.help.endswith(".") or "\n" in row.help or "|" in row.help] == []


def test_the_reference_page_holds_the_table_of_the_code() -> None:
    assert reference() in PAGE.read_text("utf-8"), "docs/metrics.md differs from metrics/catalog.py: put catalog.reference() there"
