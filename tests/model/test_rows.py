"""Rows of every format and contract, and what is said of bad ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fleetune.errors import DataError, UnsupportedError
from fleetune.model import recipe, rows
from fleetune.model.rows import Row
from support.jobs import recipe_message
from support.tiny_models import write_jsonl

CLASSES = recipe.from_proto(recipe_message())
PAIRS = recipe.from_proto(recipe_message(columns={"text": "a", "text_pair": "b", "label": "label"}))
QUESTIONS = recipe.from_proto(recipe_message("causal-lm"))
CHATS = recipe.from_proto(recipe_message("causal-lm", columns={"chat": "messages"}))
TEXTS = recipe.from_proto(recipe_message("causal-lm", columns={"text": "text"}))


def test_labels_are_names_or_ids(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in ("green", 1, "1", 1.0, " green ")])
    assert rows.read(path, None, CLASSES) == [Row("x", None, 1)] * 5


def test_a_label_that_is_a_number_in_the_jobs_list_is_a_name_first(tmp_path: Path) -> None:
    numbers = recipe.from_proto(recipe_message(labels=["2", "0", "1"]))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "2"}, {"text": "x", "label": 2}])
    assert [row.label for row in rows.read(path, None, numbers)] == [0, 2]


def test_lines_are_split_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a\u2028b\u0085c", "label": 0}\r\n\n{"text": "d", "label": 1}'.encode())
    assert [row.text for row in rows.read(path, None, CLASSES)] == ["a\u2028b\u0085c", "d"]


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,label\n"one, ""two""\nthree",red\nfour,2\n', encoding="utf-8")
    assert rows.read(path, None, CLASSES) == [Row('one, "two"\nthree', None, 0), Row("four", None, 2)]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a", "b"], "label": ["red", "blue"], "more": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert rows.read(tmp_path / "a.parquet", None, CLASSES) == [Row("a", None, 0), Row("b", None, 2)]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnsupportedError, match="Install pyarrow"):
        rows.read(tmp_path / "a.parquet", None, CLASSES)


def test_a_torn_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="is not Parquet"):
        rows.read(tmp_path / "a.parquet", None, CLASSES)


def test_pairs_questions_texts_and_chats(tmp_path: Path) -> None:
    record = {"a": "1", "b": "2", "label": "red", "input": "i", "target": "t", "text": "x"}
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [{**record, **chat}])
    assert rows.read(path, None, PAIRS) == [Row("1", "2", 0)]
    assert rows.read(path, None, QUESTIONS) == [Row("i", "t")]
    assert rows.read(path, None, TEXTS) == [Row("x")]
    assert rows.read(path, None, CHATS) == [Row(messages=(("user", "hi"), ("assistant", "ho")))]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "x"}', "column 'label' is missing; the row has: 'text'"),
        ('{"text": "x", "label": null}', "column 'label' is empty; allowed: red, green, blue, or an id from 0 to 2"),
        ('{"text": "x", "label": "pink"}', "column 'label' is 'pink'; allowed: red, green, blue"),
        ('{"text": "x", "label": 3}', "column 'label' is 3"),
        ('{"text": "x", "label": true}', "column 'label' is True"),
        ('{"text": "", "label": 0}', "column 'text' is empty"),
        ('{"text": ["x"], "label": 0}', r"column 'text' is \['x'\]"),
        ('{"text": "x", "label"', "is not JSON"),
        ("[1, 2]", r"holds \[1, 2\], an object of columns is needed"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_value(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good", "label": 0}}\n{line}\n')
    with pytest.raises(DataError, match=f"{path}:2: {complaint}"):
        rows.read(path, None, CLASSES)


def test_twenty_complaints_come_at_once_and_no_more(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "pink"}] * 50)
    with pytest.raises(DataError) as caught:
        rows.read(path, None, CLASSES)
    assert str(caught.value).count("'pink'") == 20
    assert str(caught.value).startswith("at least 20 rows do not meet the contract of the data 'colours'")


@pytest.mark.parametrize(
    ("chat", "complaint"),
    [
        ([{"role": "user", "content": "hi"}], "at least one of the assistant"),
        ([{"role": "robot", "content": "hi"}], "has the turn {'role': 'robot'"),
        ([{"role": "user"}], "has the turn {'role': 'user'}"),
        ("hello", "a list of turns"),
        ([], "a list of turns"),
    ],
)
def test_a_bad_chat_is_named(tmp_path: Path, chat: object, complaint: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    with pytest.raises(DataError, match=complaint):
        rows.read(path, None, CHATS)


def test_a_chat_in_csv_is_json(tmp_path: Path) -> None:
    chat = json.dumps([{"role": "assistant", "content": "ho"}]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{chat}"\n')
    assert rows.read(tmp_path / "a.csv", None, CHATS) == [Row(messages=(("assistant", "ho"),))]


def test_a_missing_column_of_a_table_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("words,label\na,red\nb,red\n")
    with pytest.raises(DataError, match="no column 'text'; it has: 'words', 'label'"):
        rows.read(tmp_path / "a.csv", None, CLASSES)


@pytest.mark.parametrize(("name", "complaint"), [("absent.jsonl", "does not exist"), (".", "is a folder")])
def test_a_path_that_is_no_file_is_named(tmp_path: Path, name: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        rows.read(tmp_path / name, None, CLASSES)


def test_an_empty_file_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        rows.read(tmp_path / "a.jsonl", None, CLASSES)


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="allowed: jsonl, csv, parquet"):
        rows.read(tmp_path / "a.txt", None, CLASSES)
    assert (tmp_path / "a.txt").exists()


def test_the_configured_format_goes_before_the_ending(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.data", [{"text": "x", "label": 0}])
    assert len(rows.read(path, "jsonl", CLASSES)) == 1
