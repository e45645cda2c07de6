"""`fleetune shrink`: an exported adapter of a job that pruned, and its base, become a small model of their own; on this machine."""

# Only click and the standard library at import time, as in cli.py; torch is loaded by a child.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fleetune.coordinator import cliverbs
from fleetune.coordinator.exitcodes import ExitCode

if TYPE_CHECKING:
    from fleetune.coordinator.jsonview import Json

EXAMPLES = (
    "fleetune shrink ./adapter ./small --device pi4-1",
    "fleetune shrink ./adapter ./small --base ~/models/minilm",
)
CODES = (ExitCode.MACHINE, ExitCode.NOT_FOUND)


@click.argument("adapter", metavar="ADAPTER_DIR", type=click.Path(path_type=Path))
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--device", default="", metavar="NAME", help="What this device has left of the model; without it, what all voted for.")
@click.option("--base", default="", metavar="BASE", help="Folder or hub id of the base, where it is not the hub id that the job named.")
@click.option("--offline", is_flag=True, help="Do not ask the model hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def shrink(adapter: Path, out: Path, device: str, base: str, offline: bool, as_json: bool) -> int:
    """Merge an exported adapter into its base, cut to what is left of it.

    For folders that `fleetune export` made of jobs with method fedspine. What is made loads with plain transformers where its config can
    state the sizes, and else with a small loader that lies in it; it needs nothing of Fleetune. Needs torch and transformers here.
    """
    if out.exists():
        raise click.UsageError(f"{out} exists; name a folder that does not.")
    request: dict[str, object] = {
        "adapter_folder": str(adapter.absolute()),
        "out_folder": str(out.absolute()),
        "device": device,
        "base": base,
        "allow_hub": not offline,
    }
    import asyncio

    found = asyncio.run(_asked(request))
    if as_json:
        cliverbs.print_json(found)
        return ExitCode.OK
    from fleetune.coordinator.figures import bytes_text

    size = bytes_text(int(str(found["size_bytes"])))
    whose = f"what {device} has left" if device else "what the devices voted for"
    cliverbs.say(
        f"{out}: {whose}, {float(str(found['sparsity'])):.0%} of the layers' parameters cut, "
        f"{int(str(found['parameters'])):,} of {int(str(found['base_parameters'])):,} parameters, {size}"
    )
    cliverbs.say(f"Load it as its README.md says: {'from_pretrained' if found['plain'] else 'load_pruned.py'}.")
    return ExitCode.OK


async def _asked(request: Mapping[str, object]) -> dict[str, Json]:
    from fleetune.child.process import ChildDied, ChildError, ChildProcess
    from fleetune.errors import ModelError

    child = ChildProcess("fleetune.coordinator.modelhost")
    try:
        return cast("dict[str, Json]", await child.request("shrink", request, None))
    except ChildError as error:
        raise ModelError(error.message) from error
    except ChildDied as error:
        raise ModelError(
            f"The process that makes the model has ended: {error}.", "See that torch and transformers are installed."
        ) from error
    finally:
        await child.stop()
