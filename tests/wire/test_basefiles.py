"""A base model is known by its files' bytes, and only by the files that matter."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from fleetune.errors import ModelError, WireError
from fleetune.wire import digests
from fleetune.wire.basefiles import BaseFile, safe_name, scan

OLD_S = 1_600_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "words", "vocab.txt": "a b"}.items():
        (model / name).write_text(text)
        os.utime(model / name, (OLD_S, OLD_S))
    return model


def test_the_digest_is_over_sorted_names_and_digests(folder: Path) -> None:
    found = scan(folder)
    assert [file.name for file in found.files] == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert found.files[1] == BaseFile("model.safetensors", blake3(b"weights").hexdigest(), 7)
    lines = "".join(f"{file.name}\0{file.digest}\n" for file in found.files)
    assert found.digest == blake3(lines.encode()).hexdigest()
    assert found.size_bytes == 17


def test_what_does_not_matter_does_not_count(folder: Path) -> None:
    before = scan(folder)
    (folder / "pytorch_model.bin").write_text("pickle")
    (folder / "modeling_x.py").write_text("code")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("adapter")
    (folder / "onnx").mkdir()
    assert scan(folder) == before


def test_links_into_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert scan(linked) == scan(folder)


def test_progress_counts_all_bytes(folder: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    scan(folder, lambda name, done, total: heard.append((name, done, total)))
    assert heard[-1] == ("vocab.txt", 17, 17)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)


def test_an_unchanged_file_is_not_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache.json"
    first = scan(folder, cache=cache)
    read: list[str] = []
    real = digests.of_file

    def listed(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        read.append(path.name)
        return real(path, on_bytes)

    monkeypatch.setattr(digests, "of_file", listed)
    assert scan(folder, cache=cache) == first
    assert read == []
    (folder / "vocab.txt").write_text("a c")
    assert scan(folder, cache=cache).digest != first.digest
    assert read == ["vocab.txt"]


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"/x": 1}', '{"/x": [1, 2, 3]}', '{"/x": ["a", 1, 2, "b"]}', "[" * 100_000])
def test_a_damaged_cache_costs_only_time(folder: Path, tmp_path: Path, text: str) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(text)
    assert scan(folder, cache=cache) == scan(folder)


def test_a_file_that_changed_a_moment_ago_is_read_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    (folder / "vocab.txt").write_text("new")
    scan(folder, cache=cache)
    assert "vocab.txt" not in cache.read_text()
    assert "tokenizer.json" in cache.read_text()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no folder"):
        scan(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("pickle")
    with pytest.raises(ModelError, match="saved as safetensors"):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_names_of_a_model_s_files_are_safe(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../config.json",
        "/config.json",
        "a/model.safetensors",
        "a\\model.safetensors",
        ".safetensors",
        "model.safetensors\n",
        "model.safetensors\0",
        "mödel.safetensors",
        "modeling_x.py",
        "pytorch_model.bin",
        "adapter_config.json",
        "adapter_model.safetensors",
        "x" * 200 + ".safetensors",
    ],
)
def test_other_names_from_the_network_are_refused(name: str) -> None:
    with pytest.raises(WireError, match="is not the name of a base model's file"):
        safe_name(name)
