"""What the verbs of `fleetune` share: their help, how a coordinator is reached and as whom, how answers are printed."""

# Only click and the standard library at import time, as in cli.py.

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fleetune.coordinator.exitcodes import ExitCode, sentence

if TYPE_CHECKING:
    from rich.console import Console

    from fleetune.coordinator.client import Client
    from fleetune.coordinator.jsonview import Json
    from fleetune.wire.identity import Identity

ADDRESS_VARIABLE = "FLEETUNE_COORDINATOR"
IDENTITY_VARIABLE = "FLEETUNE_IDENTITY"
PLAINTEXT_VARIABLE = "FLEETUNE_PLAINTEXT"

PLAIN_WIDTH = 120
"""Columns of a table that goes into a file or a pipe, where COLUMNS does not say otherwise."""

ASKING = (ExitCode.UNREACHABLE, ExitCode.REFUSED)

F = TypeVar("F", bound=Callable[..., object])
C = TypeVar("C", bound="Client")

_WAY = "fleetune.way"


class _Shown(click.Command):
    """Help that ends with examples and exit codes."""

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), codes: Sequence[ExitCode] = (), **settings: Any
    ) -> None:  # Any: click's own
        super().__init__(*args, **settings)
        self.examples = tuple(examples)
        self.codes = tuple(codes)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples as they are typed, then the codes."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")
        with formatter.section("Exit codes"):
            formatter.write_text(sentence(*self.codes))


class Verb(_Shown):
    """A command whose help ends with examples and its exit codes."""


class VerbGroup(_Shown, click.Group):
    """A verb with verbs of its own. With `listing`, the bare verb has options and lists what there is."""


@dataclass(frozen=True)
class Globals:
    """What stands before the verb."""

    coordinator: str | None
    no_color: bool


def reaches(function: F) -> F:
    """Options that say as whom a coordinator is asked; they may stand before the verb and after it, and the last one counts."""
    function = click.option(
        "--plaintext",
        is_flag=True,
        default=None,
        expose_value=False,
        callback=_keep,
        envvar=PLAINTEXT_VARIABLE,
        help="Without TLS, for a coordinator on this machine that runs with --plaintext.",
    )(function)
    return click.option(
        "--identity",
        type=click.Path(path_type=Path),
        metavar="DIR",
        expose_value=False,
        callback=_keep,
        help=f"Folder of your identity (or {IDENTITY_VARIABLE}); ~/.config/fleetune/identity if left out.",
    )(function)


def asks(function: F) -> F:
    """Options of every verb that asks a coordinator."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")(function)
    function = reaches(function)
    return click.option(
        "--coordinator", metavar="HOST:PORT", help=f"Where the coordinator listens (or {ADDRESS_VARIABLE}); your identity knows where."
    )(function)


def _keep(context: click.Context, parameter: click.Parameter, value: object) -> object:
    if value is not None:
        # `meta` is one for the whole command line.
        kept = context.meta.setdefault(_WAY, {})
        kept[parameter.name] = value
    return value


def identity_folder(context: click.Context) -> Path:
    """The folder of this operator's identity, whether there is one or not."""
    from fleetune.coordinator import operator

    return operator.find(context.meta.get(_WAY, {}).get("identity"), os.environ, Path.home())


def run(
    context: click.Context,
    coordinator: str | None,
    verb: Callable[[C], Coroutine[object, object, int]],
    make: Callable[..., C] | None = None,  # ...: address and identity, as Client takes them
) -> int:
    """Runs a verb on a connection that is closed whatever happens."""
    import asyncio

    from fleetune.coordinator import operator
    from fleetune.coordinator.client import Client
    from fleetune.wire.channel import split_address

    settings = context.find_object(Globals)
    address = coordinator or (settings.coordinator if settings is not None else None)
    try:
        if address:
            split_address(address)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    way = operator.reach(address, bool(context.meta.get(_WAY, {}).get("plaintext")), identity_folder(context))

    async def connected() -> int:
        if way.identity is not None:
            await _renewed_in_time(way.address, way.identity, identity_folder(context))
        client: Any = (make or Client)(way.address, way.identity)  # Any: what `verb` takes, which its type says
        async with client:
            return await verb(client)

    return int(asyncio.run(connected()))


async def _renewed_in_time(address: str, identity: Identity, folder: Path) -> None:
    """Renew an operator's certificate in the last third of its life. What keeps it from that says so, and keeps nobody from the verb."""
    from fleetune.wire.identity import renewal_due_unix_s

    if now() < renewal_due_unix_s(identity.facts):
        return
    from fleetune.coordinator import operator_renewal
    from fleetune.coordinator.fleet_client import FleetClient
    from fleetune.errors import FleetuneError

    try:
        async with FleetClient(address, identity) as client:
            await operator_renewal.renew(client, folder)
    except FleetuneError as error:
        sys.stderr.write(f"your certificate could not be renewed: {error}\n")


def print_json(document: dict[str, Json]) -> None:
    say(json.dumps(document, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def console(context: click.Context) -> Console:
    from rich.console import Console

    settings = context.find_object(Globals)
    no_color = True if settings is not None and settings.no_color else None
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PLAIN_WIDTH
    # Names and messages come from devices: what looks like markup in them is text.
    return Console(no_color=no_color, highlight=False, markup=False, emoji=False, width=width)


def now() -> float:
    return time.time()
