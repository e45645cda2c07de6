"""Lines from a child are answers of the running request, or told apart from them."""

from __future__ import annotations

import pytest

from fleetune.child import answers
from fleetune.errors import WireError


def test_the_three_kinds_of_answers() -> None:
    assert answers.read(b'{"id": 7, "result": {"n": 1}}', 7) == answers.Result({"n": 1})
    assert answers.read(b'{"id": 7, "error": {"kind": "data", "message": "no rows"}}', 7) == answers.Error("data", "", "no rows", "")
    assert answers.read(b'{"id": 7, "event": "progress"}', 7) == answers.Event({"id": 7, "event": "progress"})


def test_an_answer_to_another_request_is_none() -> None:
    assert answers.read(b'{"id": 6, "result": {}}', 7) is None


@pytest.mark.parametrize(
    "line", [b"Segmentation fault\n", b"[7]", b'{"id": 7, "result": 3}', b'{"id": 7, "error": "x"}', b"\xff", b"[" * 5000]
)
def test_what_is_no_answer_is_a_wire_error(line: bytes) -> None:
    with pytest.raises(WireError, match="child process sent"):
        answers.read(line, 7)


def test_fields_of_an_error_that_are_no_texts_are_left_out() -> None:
    assert answers.read(b'{"id": 7, "error": {"kind": 3, "stage": null}}', 7) == answers.Error("internal", "", "", "")
