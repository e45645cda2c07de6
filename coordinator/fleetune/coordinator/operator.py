"""Who an operator is towards a coordinator: where the identity lies, and how one is made from a join line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.coordinator.principal import NAME
from fleetune.errors import ConfigError
from fleetune.wire import channel, identity
from fleetune.wire.identity import Identity

if TYPE_CHECKING:
    from fleetune.wire.joinline import JoinLine

IDENTITY_VARIABLE = "FLEETUNE_IDENTITY"
DEFAULT_ADDRESS = "127.0.0.1:7433"


@dataclass(frozen=True)
class Way:
    """How a coordinator is reached. `identity` None: plaintext, on this machine."""

    address: str
    identity: Identity | None


def find(identity_option: Path | None, environment: Mapping[str, str], home: Path) -> Path:
    """The folder of this operator's identity, whether there is one or not: --identity, $FLEETUNE_IDENTITY, the person's own."""
    if identity_option is not None:
        return identity_option
    named = environment.get(IDENTITY_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "fleetune" / "identity"


def load(folder: Path) -> Identity:
    """The operator's identity. ConfigError where there is none, where it is another's kind, damaged, over, or readable by others."""
    found = identity.load(folder)
    if found is None:
        raise ConfigError(
            f"there is no operator's identity in {folder}, and a coordinator answers nobody without one.",
            "On the coordinator's machine `fleetune init` makes one; elsewhere, `fleetune join` with a line of "
            "`fleetune token create --operator`; --identity DIR names another folder.",
        )
    if found.facts.kind != "operator":
        raise ConfigError(
            f"the identity in {folder} is of {found.facts.kind} {found.facts.name!r}, not of an operator.",
            "Name another with --identity DIR.",
        )
    wrong = identity.trouble(found.facts)
    if wrong:
        raise ConfigError(
            f"{wrong}.",
            f"Set the clock if it is wrong; else get a new one with `fleetune join` and the line of an administrator ({folder}).",
        )
    return found


def reach(coordinator: str | None, plaintext: bool, folder: Path) -> Way:
    """The coordinator to ask and as whom: an address that was given, or else the one of the identity. ConfigError where neither will do."""
    if plaintext:
        address = coordinator or DEFAULT_ADDRESS
        host = address.rpartition(":")[0]
        if not channel.is_loopback(host):
            raise ConfigError(
                f"--plaintext is for a coordinator on this machine; {address} is another.", "Leave it out, or give 127.0.0.1 as the host."
            )
        return Way(address, None)
    own = load(folder)
    return Way(coordinator or own.facts.coordinator or DEFAULT_ADDRESS, own)


def join(line: JoinLine, name: str, folder: Path, *, again: bool = False) -> Identity:
    """Make an operator's identity of a join line and put it into `folder`.

    ConfigError where one is there, unless `again`; JoinRefusedError, UnreachableError as fleetune.wire.enrolment.
    """
    refuse_overwriting(folder, again=again)

    from fleetune.wire import enrolment

    made = enrolment.enrol(line, name)
    if made.facts.kind != "operator":
        raise ConfigError(
            "this token is for a device.", "Use it with `fleetune-agent join`, or make one with `fleetune token create --operator`."
        )
    put(folder, made)
    return made


@dataclass(frozen=True)
class Files:
    """PEM files from an authority of one's own."""

    certificate: Path
    key: Path
    roots: Path
    """Of the coordinator's certificate."""
    server_name: str = ""
    """The name in it; empty: the host that is dialled."""


def bring(files: Files, coordinator: str, folder: Path, *, again: bool = False) -> Identity:
    """Take a certificate of another authority instead of a line. ConfigError where it cannot be used, or one is there, unless `again`."""
    refuse_overwriting(folder, again=again)

    from fleetune.wire import keys

    made = keys.brought(_read(files.certificate), _read(files.key), _read(files.roots), coordinator, files.server_name).identity
    if made.facts.kind != "operator":
        raise ConfigError(f"the certificate is of {made.facts.kind} {made.facts.name!r}, not of an operator.", "Give the operator's own.")
    if not NAME.fullmatch(made.facts.name):
        raise ConfigError(
            f"the certificate is of {made.facts.name[:80]!r}, which the coordinator takes for nobody.",
            "Its common name must be 1 to 63 of A-Z a-z 0-9 . _ - with a letter or digit first, such as ada.",
        )
    if wrong := identity.trouble(made.facts):
        raise ConfigError(f"the certificate cannot be used: {wrong}.", "Set the clock if it is wrong; else get a newer one.")
    put(folder, made)
    return made


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(identity.PEM_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.", "Correct the path or its rights.") from error


def put(folder: Path, made: Identity) -> None:
    """Store it. ConfigError where the folder cannot be written."""
    try:
        identity.store(folder, made)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.", "Name another folder with --identity DIR.") from error


def refuse_overwriting(folder: Path, *, again: bool) -> None:
    """ConfigError where `folder` holds an identity, damaged ones included, and nobody said that it may go."""
    if again or not any((folder / name).exists() for name in (identity.FACTS_FILE, identity.KEY_FILE)):
        return
    try:
        found = identity.load(folder)
    except ConfigError as error:
        raise ConfigError(f"{folder} holds an identity that cannot be used: {error.message}", "Replace it with --again.") from error
    whose = (
        f"that of {found.facts.kind} {found.facts.name!r} at {found.facts.coordinator}"
        if found is not None
        else "a key without a certificate"
    )
    raise ConfigError(f"{folder} holds an identity, {whose}.", "Name another folder with --identity DIR, or replace it with --again.")
