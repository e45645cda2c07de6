"""DIR/testbed.json: what one verb of `fleetune testbed` leaves for the next."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fleetune.coordinator.faults import MachineError, NotFoundError
from fleetune.coordinator.testbed.backend import Place
from fleetune.coordinator.testbed.spec import TestbedSpec

FILE = "testbed.json"
FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """One testbed: which backend runs it, where, and since when."""

    backend: str
    place: Place
    made_unix_s: float


def write(kept: Kept) -> None:
    """Aside, then renamed: a reader finds all of it or nothing."""
    place = kept.place
    document = {
        "format": FORMAT,
        "backend": kept.backend,
        "prefix": place.prefix,
        "base": None if place.base is None else str(place.base),
        "options": dict(place.options or {}),
        "made_unix_s": kept.made_unix_s,
        "spec": place.spec.plain(),
    }
    write_json(place.folder / FILE, document)


def read(folder: Path) -> Kept:
    """NotFoundError where no testbed is in `folder`, MachineError where its file is damaged."""
    file = folder / FILE
    try:
        document = cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
        if document["format"] != FORMAT:
            raise MachineError(f"{file} has format {document['format']}, and {FORMAT} is known.", "Take the version that made it.")
        base = document["base"]
        place = Place(
            TestbedSpec.of_plain(document["spec"]),
            folder,
            str(document["prefix"]),
            None if base is None else Path(base),
            {str(name): str(value) for name, value in document["options"].items()},
        )
        return Kept(str(document["backend"]), place, float(document["made_unix_s"]))
    except FileNotFoundError as error:
        raise NotFoundError(f"no testbed in {folder}.", "`fleetune testbed up` makes one; --folder names another folder.") from error
    except OSError as error:
        raise MachineError(f"cannot read {file}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MachineError(f"{file} is damaged ({error}).", "Remove the folder, and what `ip netns` or `docker ps` show of it.") from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Aside and renamed, on disk before it is there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def new_prefix() -> str:
    """Names of namespaces and control groups are the whole machine's, and two testbeds may be up at once."""
    return f"ft{(int(time.time() * 1000) ^ os.getpid() << 12) & 0xFFFFFF:06x}"
