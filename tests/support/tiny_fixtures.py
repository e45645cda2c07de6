"""Session-scoped fixtures of tiny models and rows; a conftest.py that wants them imports them by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import tiny_models


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks the hub for the base of an adapter that it saves, unless it is told not to."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_classifier(tmp_path_factory.mktemp("bases") / "tiny-bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_gpt2(tmp_path_factory.mktemp("bases") / "tiny-gpt2")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_t5(tmp_path_factory.mktemp("bases") / "tiny-t5")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with text and label."""
    return tiny_models.write_jsonl(tmp_path_factory.mktemp("rows") / "colours.jsonl", tiny_models.coloured_rows())


@pytest.fixture(scope="session")
def causal_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with input and target."""
    return tiny_models.write_jsonl(tmp_path_factory.mktemp("rows") / "questions.jsonl", tiny_models.question_rows())
