"""`fleetune-agent join`: from the line that an operator handed over to an identity in the state folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fleetune.agent import identity
from fleetune.agent.config import AgentConfig
from fleetune.agent.credentials import folder_of
from fleetune.agent.identity import StateInUseError
from fleetune.errors import ConfigError
from fleetune.wire import identity as identities
from fleetune.wire import joinline
from fleetune.wire.identity import Facts, Identity

LINE_CHARACTERS_MAX = 1024


def folder(config: AgentConfig) -> Path:
    """Where the identity lies."""
    return folder_of(config.state_dir)


def refuse_overwriting(config: AgentConfig, *, again: bool) -> None:
    """ConfigError where there is an identity, a damaged one included, and nobody said that it may go."""
    place = folder(config)
    if again or not any((place / name).exists() for name in (identities.FACTS_FILE, identities.KEY_FILE)):
        return
    try:
        found = identities.load(place)
    except ConfigError as error:
        raise ConfigError(f"{place} holds an identity that cannot be used: {error.message}", "Replace it with --again.") from error
    if found is None:
        raise ConfigError(f"{place} holds a key without a certificate.", "Replace it with --again.")
    facts = found.facts
    raise ConfigError(
        f"This device has joined already: {facts.name!r}, in the fleet of {facts.coordinator}, until {date(facts.not_after_unix_s)}.",
        f"Join anew with --again, or give another --state-dir; the identity lies in {place}.",
    )


def join(config: AgentConfig, text: str) -> Facts:
    """Join with the line `text` and store the identity. ConfigError for a line or folder that cannot be used, else as enrolment.enrol."""
    line = joinline.parse(text)
    name = identity.require_name(config.name)
    device_id = _device_id(config)

    from fleetune.wire import enrolment

    made = enrolment.enrol(line, name, device_id)
    if made.facts.kind != "agent":
        raise ConfigError("This token is for an operator.", "Use it with `fleetune join`, or make one with `fleetune token create`.")
    _store(config, made)
    return made.facts


@dataclass(frozen=True)
class Files:
    """PEM files from an authority of the owner's own."""

    certificate: Path
    key: Path
    roots: Path
    server_name: str


def bring(config: AgentConfig, files: Files) -> Facts:
    """Take the certificate of another authority instead of a token. ConfigError where it cannot be used."""
    if not config.coordinator:
        raise ConfigError("No coordinator is named.", "Give --coordinator HOST:PORT: a certificate does not say where to dial.")
    from fleetune.wire import keys

    found = keys.brought(_read(files.certificate), _read(files.key), _read(files.roots), config.coordinator, files.server_name)
    facts = found.identity.facts
    if facts.kind != "agent":
        raise ConfigError(f"The certificate is of {facts.kind} {facts.name!r}, not of a device.", "Give the device's own.")
    device_id = _device_id(config)
    if found.device_id not in ("", device_id):
        raise ConfigError(
            f"The certificate names the device id {found.device_id}, and this device has {device_id}.", "Let the authority make one for it."
        )
    if wrong := identities.trouble(facts):
        raise ConfigError(f"The certificate cannot be used: {wrong}.", "Set the clock if it is wrong; else get a newer one.")
    _store(config, found.identity)
    return facts


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(identities.PEM_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.", "Correct the path or its rights.") from error


def _device_id(config: AgentConfig) -> str:
    try:
        with identity.lock(config.state_dir):
            return identity.device_id(config.state_dir)
    except StateInUseError:
        # The agent runs, and has its id: it takes up the new identity by itself.
        return identity.device_id(config.state_dir)


def _store(config: AgentConfig, made: Identity) -> None:
    try:
        identities.store(folder(config), made)
    except OSError as error:
        raise ConfigError(
            f"{folder(config)} cannot be written: {error.strerror or error}.", "Correct its rights, or set another `state_dir`."
        ) from error


def date(unix_s: float) -> str:
    """For a person."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))
