"""Checks of the shipped demo data set: sizes, labels, the split rule and leakage between the splits."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "coordinator/fleetune/coordinator/demo/data"
SPLITS = ("train", "validation", "test")
MAX_TRIGRAM_JACCARD = 0.6
MAX_EDIT_SIMILARITY = 0.9

Row = dict[str, str]
Data = dict[str, list[Row]]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _fold(text: str) -> str:
    """Lower-case, without punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower().replace("'", "")).split())


def _trigrams(folded: str) -> frozenset[tuple[str, ...]]:
    words = folded.split()
    if len(words) < 3:
        return frozenset({tuple(words)})
    return frozenset(tuple(words[i : i + 3]) for i in range(len(words) - 2))


def _read(split: str) -> list[Row]:
    with (DATA / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _ceil_percent(rows: int, percent: int) -> int:
    return -(-rows * percent // 100)


@pytest.fixture(scope="module")
def data() -> Data:
    return {split: _read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def labels() -> list[str]:
    names: list[str] = json.loads((DATA / "labels.json").read_text(encoding="utf-8"))
    return names


def test_sizes(data: Data) -> None:
    total = sum(len(rows) for rows in data.values())
    assert total >= 1500
    assert 0.60 <= len(data["train"]) / total <= 0.75


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_well_formed(data: Data, split: str) -> None:
    for row in data[split]:
        assert list(row) == ["text", "label", "family"]
        assert all(isinstance(value, str) for value in row.values())
        assert row["text"] == " ".join(row["text"].split())
        assert row["text"].isprintable()
        assert 3 <= len(row["text"]) <= 240


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_in_hash_order(data: Data, split: str) -> None:
    hashes = [_sha256(row["text"]) for row in data[split]]
    assert hashes == sorted(hashes)


def test_labels(data: Data, labels: list[str]) -> None:
    assert len(labels) == 12
    assert labels == sorted(set(labels))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", label) for label in labels)
    for split in SPLITS:
        assert {row["label"] for row in data[split]} == set(labels)


def test_rows_per_label(data: Data, labels: list[str]) -> None:
    counts = {split: Counter(row["label"] for row in data[split]) for split in SPLITS}
    for label in labels:
        assert 90 <= sum(counts[split][label] for split in SPLITS) <= 190
        assert counts["validation"][label] >= 12
        assert counts["test"][label] >= 20


def test_no_duplicate_text(data: Data) -> None:
    seen = Counter(_fold(row["text"]) for split in SPLITS for row in data[split])
    assert [text for text, times in seen.items() if times > 1] == []


def test_families(data: Data) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    labels: dict[str, set[str]] = defaultdict(set)
    sizes: Counter[str] = Counter()
    for split in SPLITS:
        for row in data[split]:
            splits[row["family"]].add(split)
            labels[row["family"]].add(row["label"])
            sizes[row["family"]] += 1
    assert [family for family, where in splits.items() if len(where) > 1] == []
    assert [family for family, names in labels.items() if len(names) > 1] == []
    assert max(sizes.values()) <= 4


def test_split_rule(data: Data, labels: list[str]) -> None:
    """The split is a function of the family ids: recompute it as CARD.md describes."""
    actual = {row["family"]: split for split in SPLITS for row in data[split]}
    sizes: dict[str, Counter[str]] = {label: Counter() for label in labels}
    for split in SPLITS:
        for row in data[split]:
            sizes[row["label"]][row["family"]] += 1
    for label in labels:
        rows = sum(sizes[label].values())
        wanted = {"test": max(20, _ceil_percent(rows, 18)), "validation": max(12, _ceil_percent(rows, 12))}
        filled: Counter[str] = Counter()
        for family in sorted(sizes[label], key=_sha256):
            split = next((name for name, want in wanted.items() if filled[name] < want), "train")
            filled[split] += sizes[label][family]
            assert actual[family] == split, family


def _near_duplicates(held_out: list[str], others: list[str]) -> list[tuple[str, str]]:
    folded = [_fold(text) for text in others]
    grams = [_trigrams(text) for text in folded]
    letters = [Counter(text) for text in folded]
    found: list[tuple[str, str]] = []
    for text in held_out:
        mine = _fold(text)
        my_grams, my_letters = _trigrams(mine), Counter(mine)
        for i, other in enumerate(folded):
            common = len(my_grams & grams[i])
            if common and common / len(my_grams | grams[i]) >= MAX_TRIGRAM_JACCARD:
                found.append((text, others[i]))
                continue
            # Two cheap upper bounds of the edit similarity spare nearly every full comparison.
            need = MAX_EDIT_SIMILARITY * (len(mine) + len(other)) / 2
            if min(len(mine), len(other)) < need or (my_letters & letters[i]).total() < need:
                continue
            if SequenceMatcher(None, mine, other, autojunk=False).ratio() >= MAX_EDIT_SIMILARITY:
                found.append((text, others[i]))
    return found


def test_near_duplicate_check_finds_them() -> None:
    assert _near_duplicates(["Turn the pump on!"], ["turn the pumps on"])
    assert _near_duplicates(["please run the well pump tonight"], ["run the well pump tonight"])
    assert not _near_duplicates(["is the pump on"], ["the pump won't turn on"])


@pytest.mark.parametrize(("held_out", "other"), [("validation", "train"), ("test", "train"), ("test", "validation")])
def test_no_near_duplicates_across_splits(data: Data, held_out: str, other: str) -> None:
    texts = {split: [row["text"] for row in data[split]] for split in SPLITS}
    assert _near_duplicates(texts[held_out], texts[other]) == []
