"""The layout of a backup: a tar file whose first member lists all others with their digests.

    manifest.json         this list, with the time, the epoch and the versions
    coordinator.sqlite    a consistent copy of the database
    blobs/<digest>        every blob that the copy names
    tls/<name>            the fleet's authority and the server's certificate, keys included, where there are any

Round folders are missing on purpose: a coordinator writes them again from its database and its blobs when it starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from fleetune.coordinator import tlsfolder
from fleetune.errors import ConfigError, WireError
from fleetune.wire import digests

FORMAT = "fleetune-backup/1"
MANIFEST = "manifest.json"
DATABASE = "coordinator.sqlite"
BLOBS = "blobs/"
TLS = "tls/"
TLS_NAMES = frozenset(TLS + name for name in tlsfolder.KEPT)
"""Secrets are among them, so that an archive is to be kept like a key."""

MANIFEST_BYTES_MAX = 64 << 20
FILE_BYTES_MAX = 1 << 42
INTEGER_MAX = 2**62


@dataclass(frozen=True)
class File:
    """One member of the archive."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a backup holds and of when it is."""

    made_unix_s: float
    fleetune_version: str
    schema_version: int
    epoch: int
    files: tuple[File, ...]

    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def dump(manifest: Manifest) -> bytes:
    return json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1).encode() + b"\n"


def load(data: bytes, archive: Path) -> Manifest:
    """The manifest of `archive`, every name of it one that a backup may hold. Raises ConfigError."""
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(archive, f"its {MANIFEST} is no JSON") from error
    if not isinstance(found, dict):
        raise damaged(archive, f"its {MANIFEST} is no object")
    fields = cast("dict[str, object]", found)
    if fields.get("format") != FORMAT:
        raise ConfigError(
            f"{archive} has the format {str(fields.get('format'))[:80]!r}; this program reads {FORMAT!r}.",
            "Restore it with the version of Fleetune that made it, or a newer one.",
        )
    made, version = fields.get("made_unix_s"), fields.get("fleetune_version")
    if not isinstance(made, float | int) or not 0 <= made < INTEGER_MAX or not isinstance(version, str):
        raise damaged(archive, f"its {MANIFEST} lacks made_unix_s or fleetune_version")
    files = tuple(_files(fields.get("files"), archive))
    if len({file.name for file in files}) != len(files):
        raise damaged(archive, f"its {MANIFEST} names a file twice")
    if DATABASE not in {file.name for file in files}:
        raise damaged(archive, f"its {MANIFEST} lists no {DATABASE}")
    schema_version, epoch = (_integer(fields.get(name), archive, name) for name in ("schema_version", "epoch"))
    return Manifest(float(made), version, schema_version, epoch, files)


def damaged(archive: Path, why: str) -> ConfigError:
    return ConfigError(f"{archive} is no whole backup: {why}.", "Take another archive; `fleetune backup` makes them.")


def _files(found: object, archive: Path) -> Iterator[File]:
    if not isinstance(found, list):
        raise damaged(archive, f"its {MANIFEST} has no list of files")
    for item in cast("list[object]", found):
        fields = cast("dict[str, object]", item) if isinstance(item, dict) else {}
        name, digest = fields.get("name"), fields.get("digest")
        try:
            allowed = (
                isinstance(name, str)
                and isinstance(digest, str)
                and (name in (DATABASE, BLOBS + digests.check(digest)) or name in TLS_NAMES)
            )
        except WireError:
            allowed = False
        if not allowed:
            raise damaged(archive, f"it names a file {str(name)[:80]!r}, allowed are {DATABASE}, {BLOBS}DIGEST and the files of {TLS}")
        yield File(cast(str, name), cast(str, digest), _integer(fields.get("size_bytes"), archive, "size_bytes", FILE_BYTES_MAX))


def _integer(value: object, archive: Path, name: str, most: int = INTEGER_MAX) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise damaged(archive, f"its {MANIFEST} has {name} = {str(value)[:40]}, allowed is 0 to {most}")
    return value
