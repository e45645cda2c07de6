"""Verbs of `fleetune` about who belongs to the fleet: init, tokens, devices, operators, joining, the authority."""

# Only click and the standard library at import time, as in cli.py.

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleetune.coordinator.cliverbs import ASKING, Globals, Verb, VerbGroup, asks, identity_folder, now, print_json, reaches, run, say
from fleetune.coordinator.cliverbs import console as open_console
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fleetune.coordinator.config import CoordinatorConfig
    from fleetune.coordinator.fleet_client import FleetClient
    from fleetune.coordinator.jsonview import Json
    from fleetune.wire.identity import Identity

_ROLES = ("view", "operate", "admin")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

_config = click.option(
    "--config", type=click.Path(path_type=Path), help="Settings file; coordinator.toml of the person or the machine if left out."
)
_state_dir = click.option("--state-dir", type=click.Path(path_type=Path), help="The coordinator's folder, where the settings name another.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")


def _span_s(context: click.Context, parameter: click.Parameter, value: str) -> float:
    """A span of time such as 90s, 30m, 12h or 7d in seconds."""
    number, unit_s = value[:-1], _UNITS_S.get(value[-1:])
    if unit_s is None or not (number.isascii() and number.isdecimal()) or not 0 < len(number) < 8:
        raise click.BadParameter(
            f"{value!r} is no time; a whole number with s, m, h or d is needed, such as 30m or 7d.", context, parameter
        )
    return int(number) * unit_s


# --- the authority ---------------------------------------------------------------------------------------------------


@click.command(
    cls=Verb,
    short_help="Make the fleet's authority and your operator's identity.",
    examples=[
        "fleetune init",
        "fleetune init --address 192.0.2.7:7433",
        "fleetune init --state-dir /var/lib/fleetune --operator ada --identity ./ada",
    ],
    codes=(ExitCode.MACHINE,),
)
@_config
@_state_dir
@click.option("--address", metavar="HOST:PORT", default="", help="What devices dial, for the lines that `fleetune token create` prints.")
@click.option("--operator", "operator_name", metavar="NAME", help="What you are called here; your login name if left out.")
@click.option("--identity", type=click.Path(path_type=Path), metavar="DIR", help="Where your identity goes; as for every verb if left out.")
@_json
@click.pass_context
def init(
    context: click.Context,
    config: Path | None,
    state_dir: Path | None,
    address: str,
    operator_name: str | None,
    identity: Path | None,
    as_json: bool,
) -> int:
    """Make the fleet's own authority, the coordinator's certificate, and your identity with the role admin.

    On the coordinator's machine, while it does not run. Nothing is ever overwritten; what an interrupted init has left is completed.
    Where only your identity is missing, a new one is made: that is also the way back in for who has lost theirs.
    """
    from fleetune.coordinator import initialise, operator

    settings = _settings(config, state_dir, {"address": address} if address else {})
    folder = operator.find(identity or context.meta.get("fleetune.way", {}).get("identity"), os.environ, Path.home())
    done = initialise.initialise(settings, operator_name or _login_name(), folder, settings.address)
    if as_json:
        print_json(
            {
                "state_dir": str(done.state_dir),
                "new_authority": done.new_authority,
                "root_fingerprint": done.root_fingerprint,
                "operator": done.operator,
                "identity": str(done.identity_folder),
                "address": done.address,
            }
        )
        return ExitCode.OK
    say(f"{done.state_dir / 'tls'}: {'a new authority' if done.new_authority else 'the authority that was there'}")
    say(f"{done.identity_folder}: operator {done.operator}, role admin")
    say("next: `fleetune serve`, then `fleetune token create` for each device; keep a backup (`fleetune backup`), it holds the authority")
    return ExitCode.OK


@click.group(
    cls=VerbGroup,
    short_help="Rotate the fleet's own authority.",
    examples=["fleetune ca rotate", "fleetune ca rotate --finish"],
    codes=(ExitCode.MACHINE,),
)
def ca() -> None:
    """The fleet's own certificate authority; on the coordinator's machine, while it runs or not."""


@ca.command(
    "rotate",
    cls=Verb,
    short_help="Replace the root without shutting anybody out.",
    examples=["fleetune ca rotate", "fleetune ca rotate --finish", "fleetune ca rotate --finish --force"],
    codes=(ExitCode.MACHINE,),
)
@click.option("--finish", is_flag=True, help="Second step: the coordinator's certificate comes from the new root, the old one goes.")
@click.option("--force", is_flag=True, help="With --finish: although some devices or operators would be shut out.")
@_config
@_state_dir
@_json
def rotate(finish: bool, force: bool, config: Path | None, state_dir: Path | None, as_json: bool) -> int:
    """Replace the fleet's root certificate in two steps.

    The first makes a new root that signs from now on; the old one stays trusted, and connected agents renew at once. The second, with
    --finish, trusts the old one no more: it names who has not renewed yet and then asks for --force. Make join lines after it.
    """
    from fleetune.coordinator import rotation

    settings = _settings(config, state_dir, {})
    done = rotation.finish(settings.state_dir, force=force) if finish else rotation.begin(settings.state_dir)
    if as_json:
        print_json(
            {"finished": finish, "root_fingerprint": done.root_fingerprint, "behind": list(done.behind), "coordinator_told": done.told}
        )
        return ExitCode.OK
    if finish:
        say(f"the root is {done.root_fingerprint[:16]}..., the old one is not trusted any more")
        if done.behind:
            say(f"shut out until they join again: {', '.join(done.behind)}")
    else:
        say(f"the new root {done.root_fingerprint[:16]}... signs from now on; the old one is still trusted")
        say(f"not renewed yet: {', '.join(done.behind) or 'nobody'}")
        say("next: `fleetune ca rotate --finish`, once everybody has renewed")
    if not done.told:
        sys.stderr.write(
            "no running coordinator was told: one that runs takes it up when somebody connects, or at once on SIGHUP (`systemctl reload`)\n"
        )
    return ExitCode.OK


# --- tokens ----------------------------------------------------------------------------------------------------------


@click.group(
    cls=VerbGroup,
    short_help="Make, list and revoke the tokens that let devices join.",
    examples=["fleetune token create", "fleetune token create --ttl 1h --uses 5", "fleetune token list", "fleetune token revoke 1a2b3c4d"],
    codes=ASKING,
)
def token() -> None:
    """Tokens let devices and operators join; each is one line to paste."""


@token.command(
    "create",
    cls=Verb,
    short_help="Print one line that lets devices or an operator join.",
    examples=[
        "fleetune token create",
        "fleetune token create --ttl 1h --uses 5",
        "fleetune token create --name kitchen-pi --replace",
        "fleetune token create --operator --role view",
        "fleetune token create --json | jq -r .line | ssh kitchen-pi fleetune-agent join",
    ],
    codes=ASKING,
)
@click.option("--ttl", "ttl_s", callback=_span_s, metavar="TIME", default="1h", show_default=True, help="How long, such as 30m, 12h, 7d.")
@click.option("--uses", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many devices may join with it.")
@click.option("--name", default="", help="Good for this name alone.")
@click.option("--replace", is_flag=True, help="A name that is in the fleet already may be taken over: for a device that was wiped.")
@click.option("--operator", "for_operator", is_flag=True, help="For an operator instead of a device; see --role.")
@click.option("--role", type=click.Choice(_ROLES), help="What the operator may do; each includes those before it.")
@asks
@click.pass_context
def token_create(
    context: click.Context,
    ttl_s: float,
    uses: int,
    name: str,
    replace: bool,
    for_operator: bool,
    role: str | None,
    coordinator: str | None,
    as_json: bool,
) -> int:
    """Make a token and print it as one line: the coordinator's address, the fingerprint of its root, and the secret.

    Paste it where `fleetune-agent join` (for an operator: `fleetune join`) asks for it, rather than as an argument that others on
    the machine see. The coordinator keeps a digest alone, so the line cannot be shown again.
    """
    if for_operator != (role is not None):
        raise click.UsageError("--operator and --role (view, operate or admin) belong together.")

    async def ask(client: FleetClient) -> int:
        from fleetune.coordinator.figures import duration_text
        from fleetune.coordinator.jsonview import message_json
        from fleetune.v1 import registry_pb2
        from fleetune.wire.channel import is_loopback
        from fleetune.wire.joinline import JoinLine, split_host

        kind = registry_pb2.IDENTITY_KIND_OPERATOR if for_operator else registry_pb2.IDENTITY_KIND_AGENT
        number = registry_pb2.Role.Value(f"ROLE_{role.upper()}") if role else registry_pb2.ROLE_UNSPECIFIED
        request = registry_pb2.CreateTokenRequest(kind=kind, role=number, name=name, replace=replace, uses=uses, ttl_s=ttl_s)
        made = await client.create_token(request)
        line = JoinLine(made.address, made.join_port, bytes.fromhex(made.root_fingerprint), made.token).text()
        if as_json:
            document: dict[str, Json] = {"line": line, "token": message_json(made.view)}
            print_json(document)
            return ExitCode.OK
        say(line)
        program = "fleetune join" if for_operator else "fleetune-agent join"
        whom = f"an operator, role {role}" if for_operator else "1 device" if uses == 1 else f"{uses} devices"
        sys.stderr.write(
            f"for {whom}{f' called {name}' if name else ''}, {duration_text(ttl_s)}; run `{program}` there and paste the line\n"
        )
        if is_loopback(split_host(made.address)):
            sys.stderr.write("this address is of this machine alone; for others, set `listen` and `address` of the coordinator\n")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


@token.command("list", cls=Verb, short_help="List the tokens of the last months.", examples=["fleetune token list"], codes=ASKING)
@asks
@click.pass_context
def token_list(context: click.Context, coordinator: str | None, as_json: bool) -> int:
    """List tokens: for whom, how many uses are left, how long they are good. The secrets are kept nowhere."""
    console = open_console(context)

    async def ask(client: FleetClient) -> int:
        from fleetune.coordinator import listing
        from fleetune.coordinator.jsonview import message_json

        found = await client.tokens()
        if as_json:
            print_json({"tokens": [message_json(view) for view in found]})
        elif found:
            console.print(listing.tokens(found, now_unix_s=now()))
        else:
            say("no tokens; `fleetune token create` makes one")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


@token.command(
    "revoke",
    cls=Verb,
    short_help="Let nobody join with a token any more.",
    examples=["fleetune token revoke 1a2b3c4d"],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("token_id", metavar="ID")
@asks
@click.pass_context
def token_revoke(context: click.Context, token_id: str, coordinator: str | None, as_json: bool) -> int:
    """Let nobody join with a token any more; who has joined with it stays in."""

    async def ask(client: FleetClient) -> int:
        from fleetune.coordinator.jsonview import message_json

        view = await client.revoke_token(token_id)
        if as_json:
            print_json({"token": message_json(view)})
        else:
            say(f"token {view.token_id} is revoked")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


# --- devices and operators -------------------------------------------------------------------------------------------


@click.group(
    cls=VerbGroup,
    invoke_without_command=True,
    short_help="List the devices; revoke, quarantine or release one.",
    examples=[
        "fleetune devices",
        "fleetune devices --json | jq '.devices[] | select(.online) | .name'",
        "fleetune devices revoke kitchen-pi",
        "fleetune devices quarantine kitchen-pi --reason 'odd updates'",
    ],
    codes=ASKING,
)
@asks
@click.pass_context
def devices(context: click.Context, coordinator: str | None, as_json: bool) -> int:
    """List the devices: what they are, what they do, when they were last seen; or, with a verb, change what one may do."""
    if context.invoked_subcommand is not None:
        return ExitCode.OK
    console = open_console(context)

    async def ask(client: FleetClient) -> int:
        from fleetune.coordinator import listing
        from fleetune.coordinator.jsonview import message_json

        found = await client.devices()
        if as_json:
            print_json({"devices": [message_json(device) for device in found]})
        elif found:
            console.print(listing.devices(found, now_unix_s=now(), width=console.width))
        else:
            say("no devices yet; `fleetune token create` makes a line with which one joins")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


@devices.command(
    "revoke",
    cls=Verb,
    short_help="Shut a device out, at once.",
    examples=["fleetune devices revoke kitchen-pi", "fleetune devices revoke kitchen-pi --reason 'sold'"],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("name", metavar="NAME")
@click.option("--reason", default="", help="Why, for the audit log.")
@asks
@click.pass_context
def devices_revoke(context: click.Context, name: str, reason: str, coordinator: str | None, as_json: bool) -> int:
    """Take none of a device's certificates any more and end its connections now.

    It comes back only by a token made for it: `fleetune token create --name NAME --replace`.
    """
    return _revoke(context, "agent", name, reason, coordinator, as_json)


@devices.command(
    "quarantine",
    cls=Verb,
    short_help="Give a device no tasks until it is released.",
    examples=["fleetune devices quarantine kitchen-pi --reason 'odd updates'"],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("name", metavar="NAME")
@click.option("--reason", default="", help="Why; `fleetune devices` shows it.")
@asks
@click.pass_context
def devices_quarantine(context: click.Context, name: str, reason: str, coordinator: str | None, as_json: bool) -> int:
    """Give a device no tasks until it is released; it stays connected, and what it works on now it may end."""
    return _quarantine(context, name, True, reason, coordinator, as_json)


@devices.command(
    "release",
    cls=Verb,
    short_help="Give a device tasks again.",
    examples=["fleetune devices release kitchen-pi"],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("name", metavar="NAME")
@asks
@click.pass_context
def devices_release(context: click.Context, name: str, coordinator: str | None, as_json: bool) -> int:
    """End a device's quarantine."""
    return _quarantine(context, name, False, "", coordinator, as_json)


@click.group(
    cls=VerbGroup,
    short_help="List operators, renew yourself, or revoke one.",
    examples=["fleetune operators list", "fleetune operators renew", "fleetune operators revoke ada"],
    codes=ASKING,
)
def operators() -> None:
    """Who may ask the coordinator for what; `fleetune token create --operator` lets another one join.

    Where another authority makes the certificates, `fleetune join --certificate` takes an operator's.
    """


@operators.command("list", cls=Verb, short_help="List operators with their roles.", examples=["fleetune operators list"], codes=ASKING)
@asks
@click.pass_context
def operators_list(context: click.Context, coordinator: str | None, as_json: bool) -> int:
    """List operators with their roles and how long their certificates are good."""
    console = open_console(context)

    async def ask(client: FleetClient) -> int:
        from fleetune.coordinator import listing
        from fleetune.coordinator.jsonview import message_json
        from fleetune.v1 import registry_pb2

        newest = {v.name: v for v in await client.certificates() if v.kind == registry_pb2.IDENTITY_KIND_OPERATOR}
        if as_json:
            print_json({"operators": [message_json(view) for view in newest.values()]})
        elif newest:
            console.print(listing.operators(list(newest.values()), now_unix_s=now()))
        else:
            say("no operators: this coordinator runs without TLS, or another authority made their certificates")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


@operators.command(
    "renew",
    cls=Verb,
    short_help="Renew your own certificate.",
    examples=["fleetune operators renew"],
    codes=ASKING,
)
@asks
@click.pass_context
def operators_renew(context: click.Context, coordinator: str | None, as_json: bool) -> int:
    """Get a new certificate for your own identity.

    Every verb does so by itself in the last third of a certificate's life; this is for the days of `fleetune ca rotate`.
    """
    from fleetune.coordinator.operator_renewal import renew

    folder = identity_folder(context)

    async def ask(client: FleetClient) -> int:
        made = await renew(client, folder)
        if as_json:
            print_json({"identity": str(folder), "name": made.facts.name, "not_after_unix_s": made.facts.not_after_unix_s})
        else:
            say(f"{folder}: renewed for {made.facts.name}")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


@operators.command(
    "revoke",
    cls=Verb,
    short_help="Shut an operator out, at once.",
    examples=["fleetune operators revoke ada"],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("name", metavar="NAME")
@click.option("--reason", default="", help="Why, for the audit log.")
@asks
@click.pass_context
def operators_revoke(context: click.Context, name: str, reason: str, coordinator: str | None, as_json: bool) -> int:
    """Take none of an operator's certificates any more and end its calls now."""
    return _revoke(context, "operator", name, reason, coordinator, as_json)


@click.command(
    cls=Verb,
    short_help="Become an operator on this machine, with a line from another.",
    examples=[
        "fleetune join",
        "fleetune join --name ada",
        "ssh coordinator fleetune token create --operator --role view | fleetune join -",
        "fleetune join --certificate ada.pem --key ada.key --roots ca.pem --coordinator fleet.example:7433",
    ],
    codes=(ExitCode.UNREACHABLE, ExitCode.REFUSED),
)
@click.argument("line", metavar="[LINE|-]", default="")
@click.option("--name", metavar="NAME", help="What you are called there; your login name if left out.")
@click.option("--again", is_flag=True, help="Replace an identity that is there.")
@click.option("--certificate", metavar="FILE", type=click.Path(path_type=Path), help="PEM of an authority of your own, instead of a line.")
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="With --certificate: its key.")
@click.option("--roots", metavar="FILE", type=click.Path(path_type=Path), help="With --certificate: the roots of the coordinator's.")
@click.option("--coordinator", metavar="HOST:PORT", help="With --certificate: the coordinator to dial from then on.")
@click.option("--server-name", metavar="NAME", default="", help="With --certificate: the name in the coordinator's, if not its host.")
@reaches
@_json
@click.pass_context
def join(
    context: click.Context,
    line: str,
    name: str | None,
    again: bool,
    certificate: Path | None,
    key: Path | None,
    roots: Path | None,
    coordinator: str | None,
    server_name: str,
    as_json: bool,
) -> int:
    """Make an operator's identity on this machine, with a line that `fleetune token create --operator` printed elsewhere.

    Without LINE it is asked for, or read from standard input: an argument could be seen by others on this machine. Where the fleet has
    an authority of its own making, --certificate, --key and --roots take what that one gave you; name and role stand in the certificate.
    """
    from fleetune.coordinator import operator

    folder = identity_folder(context)
    operator.refuse_overwriting(folder, again=again)
    if certificate is not None or key is not None or roots is not None:
        if certificate is None or key is None or roots is None or line or name:
            raise click.UsageError("--certificate, --key and --roots belong together, and replace the line and --name.")
        address = _dialled(context, coordinator)
        made = operator.bring(operator.Files(certificate, key, roots, server_name), address, folder, again=again)
    elif coordinator or server_name:
        raise click.UsageError("--coordinator and --server-name go with --certificate; a line has the coordinator's address.")
    else:
        made = _joined(line, name, folder, again)
    if as_json:
        print_json({"identity": str(folder), "name": made.facts.name, "role": made.facts.role, "coordinator": made.facts.coordinator})
    else:
        say(f"{folder}: operator {made.facts.name}, role {made.facts.role}, of the coordinator at {made.facts.coordinator}")
    return ExitCode.OK


VERBS: tuple[click.Command, ...] = (init, ca, token, devices, operators, join)


# --- small parts -----------------------------------------------------------------------------------------------------


def _ask(context: click.Context, coordinator: str | None, verb: Callable[[FleetClient], Coroutine[object, object, int]]) -> int:
    from fleetune.coordinator.fleet_client import FleetClient

    return run(context, coordinator, verb, FleetClient)


def _joined(line: str, name: str | None, folder: Path, again: bool) -> Identity:
    """With the line that was given, typed or piped in."""
    from fleetune.coordinator import operator
    from fleetune.wire import joinline

    if not line and sys.stdin.isatty():
        line = click.prompt("Join line", hide_input=True, type=str)
    elif line in ("", "-"):
        line = sys.stdin.readline()
    return operator.join(joinline.parse(line), name or _login_name(), folder, again=again)


def _dialled(context: click.Context, coordinator: str | None) -> str:
    """The address for an identity that does not say it: of the verb, or of what stands before it."""
    from fleetune.wire.channel import split_address

    settings = context.find_object(Globals)
    address = coordinator or (settings.coordinator if settings is not None else None)
    if not address:
        raise click.UsageError("--coordinator HOST:PORT is needed with --certificate: a certificate does not say where to dial.")
    try:
        split_address(address)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return address


def _login_name() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a container whose user has no name
        raise ConfigError("your user has no login name here.", "Give a name with --operator (init) or --name (join).") from error


def _revoke(context: click.Context, kind: str, name: str, reason: str, coordinator: str | None, as_json: bool) -> int:
    async def ask(client: FleetClient) -> int:
        from fleetune.v1 import registry_pb2

        number = registry_pb2.IDENTITY_KIND_AGENT if kind == "agent" else registry_pb2.IDENTITY_KIND_OPERATOR
        done = await client.revoke(number, name, reason)
        if as_json:
            print_json({"name": name, "certificates": done.certificates, "calls_ended": done.streams})
        else:
            say(f"{name} is shut out: certificates {done.certificates}, calls ended {done.streams}")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


def _quarantine(context: click.Context, name: str, quarantined: bool, reason: str, coordinator: str | None, as_json: bool) -> int:
    async def ask(client: FleetClient) -> int:
        await client.set_quarantine(name, quarantined, reason)
        if as_json:
            print_json({"name": name, "quarantined": quarantined})
        else:
            say(f"{name} gets {'no tasks until it is released' if quarantined else 'tasks again'}")
        return ExitCode.OK

    return _ask(context, coordinator, ask)


def _settings(config: Path | None, state_dir: Path | None, overrides: dict[str, object]) -> CoordinatorConfig:
    """The coordinator's settings, as `serve` would have them."""
    from fleetune.coordinator import config as configuration

    file = config if config is not None else configuration.find_file(os.environ, Path.home())
    if state_dir is not None:
        overrides = {**overrides, "state_dir": str(state_dir.absolute())}
    settings = configuration.load(file, os.environ, overrides)
    if settings.state_dir.exists() and not settings.state_dir.is_dir():
        raise ConfigError(f"state_dir {settings.state_dir} is no folder.", "Name another with --state-dir.")
    return settings
