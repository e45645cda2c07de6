"""The table of settings and the words of its complaints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fleetune import settings, tomltext
from fleetune.complaints import SHOWN_CHARACTERS_MAX, Complaint, ComplaintsError, did_you_mean, shown
from fleetune.platform_check import require_64bit, why_unsupported
from fleetune.settings import Kind, Setting, Sources

TABLE = (
    Setting("port", Kind.INTEGER, 1, "A port.", "", 1, 9),
    Setting("rate", Kind.NUMBER, 0.5, "A rate.", "bit/s", 0),
    Setting("on", Kind.SWITCH, False, "A switch."),
    Setting("words", Kind.TEXTS, (), "Words."),
    Setting("where.folder", Kind.PLACE, "", "A folder.", default_words="none"),
    Setting("sets.*.file", Kind.PLACE, "", "A file."),
    Setting("sets.*.kind", Kind.TEXT, "a", "A kind.", choices=("a", "b")),
)


def read(document: dict[str, object], environment: dict[str, str] | None = None, **overrides: object) -> settings.Settings:
    return settings.read(TABLE, Sources(document, Path("/file"), environment or {}, "X_", overrides, Path("/here")))


def test_every_row_has_its_default() -> None:
    found = read({})
    assert (found.integer("port"), found.number("rate"), found.switch("on"), found.texts("words")) == (1, 0.5, False, ())
    assert found.place("where.folder") is None
    assert found.names("sets") == ()


def test_a_chosen_name_has_all_its_rows() -> None:
    found = read({"sets": {"x.y": {"file": "f"}}})
    assert found.names("sets") == ("x.y",)
    assert found.place("sets", "x.y", "file") == Path("/file/f")
    assert found.text("sets", "x.y", "kind") == "a"


@pytest.mark.parametrize(
    ("name", "text", "value"), [("X_PORT", " 7 ", 7), ("X_RATE", "1e3", 1000.0), ("X_ON", "ON", True), ("X_WORDS", "a, b,", ("a", "b"))]
)
def test_texts_of_the_environment_become_values(name: str, text: str, value: object) -> None:
    assert read({}, {name: text}).values[(name[2:].lower(),)] == value


@pytest.mark.parametrize(
    "document",
    [
        {"port": 10},
        {"port": True},
        {"port": 1.0},
        {"rate": float("nan")},
        {"rate": -1},
        {"on": 1},
        {"words": "a"},
        {"words": [1]},
        {"where": 3},
        {"where": {"folder": "\0"}},
        {"port": {"a": 1}},
        {"sets": {"x": {"kind": "c"}}},
        {"prot": 1},
        {"sets": {"x": {"fiel": 1}}},
    ],
)
def test_one_wrong_value_is_one_complaint_and_the_default_stays(document: dict[str, object]) -> None:
    found = read(document)
    assert len(found.complaints) == 1
    assert found.complaints[0].remedy
    assert found.integer("port") == 1


def test_an_empty_section_is_no_mistake() -> None:
    assert read({"where": {}, "sets": {}}).complaints == ()


_VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "folder", "file", "kind", "", "x.y"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis_settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["port", "rate", "on", "words", "where", "sets", "z", ""]), _VALUES))
def test_no_document_raises(document: dict[str, object]) -> None:
    found = read(document)
    assert set(found.values) >= {("port",), ("rate",), ("on",), ("words",), ("where", "folder")}


def test_the_reference_has_a_row_for_each_setting() -> None:
    page = settings.reference(TABLE, "X_")
    assert page.count("\n| `") == len(TABLE)
    assert "| `port` | a whole number from 1 to 9 | `1` |  | A port. | `X_PORT` |" in page
    assert "### `[sets.NAME]`" in page


@hypothesis_settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_value_is_shown_on_one_short_line(value: object) -> None:
    text = shown(value)
    assert len(text) <= SHOWN_CHARACTERS_MAX
    assert text.isprintable()


def test_texts_are_shown_as_toml_writes_them() -> None:
    assert shown('a "b"\n') == json.dumps('a "b"\n')
    assert shown(True) == "true"
    assert shown("\u202e\x1b") == '"\\u202e\\u001b"'


def test_the_nearest_known_word_is_meant() -> None:
    assert did_you_mean("learning_rat", ["learning_rate", "rank"]) == "learning_rate"
    assert did_you_mean("x" * 1_000_000, ["rank"]) == ""


def test_an_error_lists_every_complaint() -> None:
    error = ComplaintsError("job.toml", [Complaint("a.b", "3", "1 or 2", "Set it."), Complaint("c", "", "a text", "Add it.")])
    assert str(error) == "job.toml has 2 mistakes:\n  a.b = 3 (allowed: 1 or 2): Set it.\n  c (allowed: a text): Add it."


def test_toml_errors_carry_their_place(tmp_path: Path) -> None:
    with pytest.raises(tomltext.TomlError) as caught:
        tomltext.parse("a = 1\nb = ?")
    assert (caught.value.line, caught.value.column) == (2, 5)
    file = tmp_path / "x.toml"
    file.write_bytes(b"a = '\xff'")
    with pytest.raises(tomltext.TomlError, match="UTF-8"):
        tomltext.read(file)


def test_a_32_bit_userland_is_refused_even_under_a_64_bit_kernel() -> None:
    assert "32-bit build on aarch64" in why_unsupported(4, "aarch64")
    assert why_unsupported(8, "aarch64") == ""


def test_this_python_is_accepted() -> None:
    require_64bit()


@pytest.mark.parametrize("number", [10**400, -(10**400), 2**63])
def test_a_whole_number_that_no_float_holds_is_a_complaint(number: int) -> None:
    assert [complaint.path for complaint in read({"rate": number}).complaints] == ["rate"]


def test_a_complaint_about_a_name_of_thousands_of_characters_stays_short() -> None:
    (complaint,) = read({"x" * 5000: 1}).complaints
    assert len(complaint.path) <= SHOWN_CHARACTERS_MAX
