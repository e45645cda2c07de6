"""`fleetune shrink`: an exported adapter of a job that pruned, and its base, become a small model of their own; on this machine."""

# Only click and the standard library at import time, as in cli.py; torch is loaded by a child.

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fleetune.coordinator import cliverbs
from fleetune.coordinator.exitcodes import ExitCode

if TYPE_CHECKING:
    from fleetune.coordinator.jsonview import Json

EXAMPLES = (
    "fleetune shrink ./adapter ./small --device pi4-1",
    "fleetune shrink ./adapter ./small --class 'Raspberry Pi 5'",
    "fleetune shrink ./adapter ./small-models --per-class",
    "fleetune shrink ./adapter ./small --base ~/models/minilm",
)
CODES = (ExitCode.MACHINE, ExitCode.NOT_FOUND)


@click.argument("adapter", metavar="ADAPTER_DIR", type=click.Path(path_type=Path))
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--device", default="", metavar="NAME", help="What this device has left of the model; without it, what all voted for.")
@click.option("--class", "hardware", default="", metavar="NAME", help="What the devices of this class of hardware voted for.")
@click.option("--per-class", is_flag=True, help="A model for each class of hardware, in folders of DIR.")
@click.option("--base", default="", metavar="BASE", help="Folder or hub id of the base, where it is not the hub id that the job named.")
@click.option("--offline", is_flag=True, help="Do not ask the model hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def shrink(adapter: Path, out: Path, device: str, hardware: str, per_class: bool, base: str, offline: bool, as_json: bool) -> int:
    """Merge an exported adapter into its base, cut to what is left of it.

    For folders that `fleetune export` made of jobs with method fedspine. What is made loads with plain transformers where its config can
    state the sizes, and else with a small loader that lies in it; it needs nothing of Fleetune. Needs torch and transformers here.

    A device's class of hardware is what its owner calls it (a tag `class:NAME`), else its board, its accelerator or its kind of processor;
    the adapter's manifest.json tells each device's.
    """
    if sum((bool(device), bool(hardware), per_class)) > 1:
        raise click.UsageError("--device, --class and --per-class exclude each other; name one of them, or none for what all voted for.")
    if out.exists():
        raise click.UsageError(f"{out} exists; name a folder that does not.")
    request: dict[str, object] = {
        "adapter_folder": str(adapter.absolute()),
        "out_folder": str(out.absolute()),
        "device": device,
        "hardware": hardware,
        "base": base,
        "allow_hub": not offline,
    }
    requests = [request]
    if per_class:
        out.mkdir(parents=True)
        folders = folder_names(_classes(adapter))
        requests = [{**request, "hardware": name, "out_folder": str((out / folder).absolute())} for name, folder in folders.items()]
    import asyncio

    made = asyncio.run(_asked(requests))
    if as_json:
        cliverbs.print_json({"classes": [*made]} if per_class else made[0])
        return ExitCode.OK
    for found in made:
        _tell(found, Path(str(found["folder"])) if per_class else out)
    return ExitCode.OK


def _tell(found: Mapping[str, Json], folder: Path) -> None:
    from fleetune.coordinator.figures import bytes_text

    device, hardware = str(found["device"]), str(found["hardware"])
    whose = f"what {device} has left" if device else f"what the devices of class {hardware} voted for" if hardware else ""
    size = bytes_text(int(str(found["size_bytes"])))
    cliverbs.say(
        f"{folder}: {whose or 'what the devices voted for'}, {float(str(found['sparsity'])):.0%} of the layers' parameters cut, "
        f"{int(str(found['parameters'])):,} of {int(str(found['base_parameters'])):,} parameters, {size}"
    )
    cliverbs.say(f"Load it as its README.md says: {'from_pretrained' if found['plain'] else 'load_pruned.py'}.")


def folder_names(classes: Iterable[str]) -> dict[str, str]:
    """Class of hardware -> a folder name of its own, of what every file system takes."""
    found: dict[str, str] = {}
    for name in sorted(classes):
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "unknown"
        taken = set(found.values())
        found[name] = next(each for each in (plain, *(f"{plain}-{number}" for number in range(2, 1000))) if each not in taken)
    return found


def _classes(adapter: Path) -> set[str]:
    """Of the devices in a round's manifest."""
    from fleetune.errors import ModelError

    try:
        manifest = cast("object", json.loads((adapter / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter / 'manifest.json'} cannot be read: {error}.", "Name the folder that `fleetune export` made.") from error
    devices = cast("dict[str, object]", manifest).get("devices") if isinstance(manifest, dict) else None
    entries = [cast("dict[str, object]", entry) for entry in cast("list[object]", devices or []) if isinstance(entry, dict)]
    found = {str(entry["hardware"]) for entry in entries if entry.get("structure") and entry.get("hardware")}
    if not found:
        raise ModelError("The adapter's manifest tells no class of hardware.", "Name an adapter of a job with method fedspine.")
    return found


async def _asked(requests: Sequence[Mapping[str, object]]) -> list[dict[str, Json]]:
    from fleetune.child.process import ChildDied, ChildError, ChildProcess
    from fleetune.errors import ModelError

    child = ChildProcess("fleetune.coordinator.modelhost")
    try:
        return [cast("dict[str, Json]", await child.request("shrink", request, None)) for request in requests]
    except ChildError as error:
        raise ModelError(error.message) from error
    except ChildDied as error:
        raise ModelError(
            f"The process that makes the model has ended: {error}.", "See that torch and transformers are installed."
        ) from error
    finally:
        await child.stop()
