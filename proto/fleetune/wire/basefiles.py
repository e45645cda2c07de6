"""The files of a base model's folder that matter, and their digests."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fleetune.errors import ModelError, WireError
from fleetune.wire import digests

# Called with a file's name, the bytes of all files read so far, and the bytes of all files.
Progress = Callable[[str, int, int], None]

_NAMES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer.model",
        "chat_template.jinja",
    }
)
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_BARE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", re.ASCII)
# A file changed within a file system's time resolution keeps its mtime: only files at rest go into the cache.
_AT_REST_NS = 2_000_000_000
_CACHE_ENTRIES = 4096


@dataclass(frozen=True)
class BaseFile:
    """One file of a base model; `name` is a bare file name."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base model sorted by name; folders with the same `digest` hold the same model."""

    files: tuple[BaseFile, ...]
    digest: str

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def matters(name: str) -> bool:
    """Whether a file of this bare name is part of a base model. Code, pickles and adapters are not."""
    # An adapter beside the weights would be loaded with them, on one machine and not on the other.
    return name in _NAMES or (name.endswith(_WEIGHTS) and not name.startswith("adapter_"))


def safe_name(name: str) -> str:
    """The name itself; WireError unless it is a bare file name that a base model may have. For names from the network."""
    if not _BARE.fullmatch(name) or not matters(name):
        raise WireError(
            f"{name[:80]!r} is not the name of a base model's file.",
            f"Allowed are bare names that end in .safetensors or are one of: {', '.join(sorted(_NAMES))}.",
        )
    return name


def base_digest(files: Iterable[BaseFile]) -> str:
    """Digest over the sorted "name NUL digest LF" lines."""
    running = digests.running()
    for line in sorted(f"{file.name}\0{file.digest}\n" for file in files):
        running.update(line.encode())
    return running.hexdigest()


def scan(folder: Path, progress: Progress | None = None, cache: Path | None = None) -> BaseFiles:
    """Digests of the files that matter in `folder`; a JSON file at `cache` spares reading files that have not changed.

    ModelError for a folder that is missing or holds no model; OSError where a file cannot be read.
    """
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}.", "Give the folder of a model in the Hugging Face layout.")
    names = sorted(entry.name for entry in folder.iterdir() if matters(entry.name) and entry.is_file())
    strange = [name for name in names if not _BARE.fullmatch(name)]
    if strange:
        raise ModelError(f"{folder} holds a file named {strange[0]!r}.", "Use letters, digits and . _ + - in names of weight files.")
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{folder} holds no model: config.json and a .safetensors file are needed.",
            "Weights in another format have to be saved as safetensors first.",
        )
    known = _load_cache(cache)
    sizes = {name: (folder / name).stat().st_size for name in names}
    total = sum(sizes.values())
    done = 0
    files: list[BaseFile] = []
    for name in names:

        def on_bytes(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(name, done, total)

        files.append(_digest(folder / name, known, on_bytes))
    if cache is not None:
        _save_cache(cache, known)
    return BaseFiles(tuple(files), base_digest(files))


@dataclass(frozen=True)
class _Known:
    """A digest and the file's state under which it was taken."""

    size_bytes: int
    mtime_ns: int
    inode: int
    digest: str

    def fits(self, found: os.stat_result) -> bool:
        return (self.size_bytes, self.mtime_ns, self.inode) == (found.st_size, found.st_mtime_ns, found.st_ino)


def _digest(path: Path, known: dict[str, _Known], on_bytes: Callable[[int], None]) -> BaseFile:
    key = str(path.resolve())
    before = path.stat()
    entry = known.get(key)
    if entry is not None and entry.fits(before):
        on_bytes(before.st_size)
        return BaseFile(path.name, entry.digest, entry.size_bytes)
    digest = digests.of_file(path, on_bytes)
    entry = _Known(before.st_size, before.st_mtime_ns, before.st_ino, digest)
    if not entry.fits(path.stat()):
        raise ModelError(f"{path} changed while it was being read.", "Wait until the model is written completely.")
    known.pop(key, None)
    if time.time_ns() - before.st_mtime_ns > _AT_REST_NS:
        known[key] = entry
    return BaseFile(path.name, digest, before.st_size)


def _load_cache(cache: Path | None) -> dict[str, _Known]:
    """What the cache holds; a cache that is missing or damaged costs time, nothing else."""
    if cache is None:
        return {}
    try:
        loaded: object = json.loads(cache.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    if not isinstance(loaded, dict):
        return {}
    known: dict[str, _Known] = {}
    for path, entry in cast("dict[str, object]", loaded).items():
        if not isinstance(entry, list):
            continue
        match cast("list[object]", entry):
            case [int() as size_bytes, int() as mtime_ns, int() as inode, str() as digest]:
                known[path] = _Known(size_bytes, mtime_ns, inode, digest)
            case _:
                continue
    return known


def _save_cache(cache: Path, known: dict[str, _Known]) -> None:
    kept = dict(list(known.items())[-_CACHE_ENTRIES:])
    rows = {path: [entry.size_bytes, entry.mtime_ns, entry.inode, entry.digest] for path, entry in kept.items() if _is_file(path)}
    aside = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    os.replace(aside, cache)


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
