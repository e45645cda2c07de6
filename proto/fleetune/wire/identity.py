"""Who a process is towards the other side of a connection: its key, its certificate and the roots it trusts, as files of one folder.

A key is worth nothing with another key's certificate, so all files change together: what is to be stored is first written into one file,
which counts from the moment in which it is there, and is then laid out into the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from fleetune.errors import ConfigError

Kind = Literal["agent", "operator", "coordinator"]

SERVER_NAME = "coordinator.fleetune.internal"
"""The name in a coordinator's certificate from its own authority. It names the role, not the machine: the authority is the fleet's own, so
the address may change without a new certificate."""

KEY_FILE, CERTIFICATE_FILE, ROOTS_FILE, FACTS_FILE = "key.pem", "certificate.pem", "roots.pem", "identity.json"
PENDING_FILE = "pending.json"
"""All of an identity that is being stored; there only until its files are."""

PEM_BYTES_MAX = 256 * 1024
UNIX_S_MAX = 2.0**37
"""In the year 6325."""


@dataclass(frozen=True)
class Facts:
    """What is known of a certificate without reading it. Times are Unix seconds; `server_name` empty: the host that is dialled."""

    kind: Kind
    name: str
    role: str
    """Of an operator: view, operate or admin; else empty."""
    coordinator: str
    """HOST:PORT that it was made for; a setting or an option may say another."""
    server_name: str
    not_before_unix_s: float
    not_after_unix_s: float


@dataclass(frozen=True)
class Identity:
    """A key with its certificate chain and the roots, all PEM."""

    facts: Facts
    key: bytes = field(repr=False)
    certificate: bytes
    roots: bytes


def load(folder: Path) -> Identity | None:
    """The identity in `folder`; None where there is none. Raises ConfigError for files that cannot be used or that others may read."""
    pending = _pending(folder)
    if pending is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be written now is none the worse to read
            _lay_out(folder, pending)
        return pending
    try:
        text = _read(folder / FACTS_FILE)
    except FileNotFoundError:
        return None
    facts = _facts(text, folder / FACTS_FILE)
    _check_mode(folder / KEY_FILE)
    try:
        return Identity(facts, _read(folder / KEY_FILE), _read(folder / CERTIFICATE_FILE), _read(folder / ROOTS_FILE))
    except FileNotFoundError as error:
        raise _missing(Path(error.filename)) from error


def store(folder: Path, identity: Identity) -> None:
    """Put the files in place, durably, all of them or none. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    parts = {name: getattr(identity, name).decode("ascii") for name in _PARTS}
    _write(folder / PENDING_FILE, json.dumps({"facts": _document(identity.facts), **parts}).encode())
    _sync(folder)
    _lay_out(folder, identity)


def trouble(facts: Facts, now_unix_s: float | None = None) -> str:
    """Why the other side would refuse this certificate by its dates, or an empty string. A refused handshake itself tells nobody why."""
    now = time.time() if now_unix_s is None else now_unix_s
    if now > facts.not_after_unix_s:
        return f"the certificate of {facts.name!r} ended on {_date(facts.not_after_unix_s)}, and this machine's clock says {_date(now)}"
    if now < facts.not_before_unix_s:
        return f"the certificate of {facts.name!r} begins on {_date(facts.not_before_unix_s)}, and this machine's clock says {_date(now)}"
    return ""


def renewal_due_unix_s(facts: Facts) -> float:
    """When two thirds of the certificate's life are over."""
    return facts.not_before_unix_s + (facts.not_after_unix_s - facts.not_before_unix_s) * 2 / 3


_PARTS = ("key", "certificate", "roots")


def _lay_out(folder: Path, identity: Identity) -> None:
    _write(folder / KEY_FILE, identity.key)
    _write(folder / CERTIFICATE_FILE, identity.certificate)
    _write(folder / ROOTS_FILE, identity.roots)
    _write(folder / FACTS_FILE, json.dumps(_document(identity.facts), indent=1).encode() + b"\n")
    _sync(folder)
    (folder / PENDING_FILE).unlink(missing_ok=True)  # a reader may have laid it out meanwhile
    _sync(folder)


def _pending(folder: Path) -> Identity | None:
    path = folder / PENDING_FILE
    try:
        text = _read(path)
    except FileNotFoundError:
        return None
    _check_mode(path)
    try:
        found = json.loads(text)
        parts = [found[name].encode("ascii") for name in _PARTS]
        facts = json.dumps(found["facts"]).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error
    return Identity(_facts(facts, path), *parts)


def _document(facts: Facts) -> dict[str, object]:
    return {name: getattr(facts, name) for name in Facts.__dataclass_fields__}


def _facts(text: bytes, path: Path) -> Facts:
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise TypeError("no JSON object")
        found = cast("dict[str, object]", document)
        kind = found["kind"]
        if kind not in ("agent", "operator", "coordinator"):
            raise ValueError(f"kind {kind!r}")
        t = {name: found[name] for name in ("name", "role", "coordinator", "server_name")}
        n = {name: found[name] for name in ("not_before_unix_s", "not_after_unix_s")}
        if not all(isinstance(text, str) for text in t.values()) or not all(isinstance(time_s, int | float) for time_s in n.values()):
            raise TypeError("a field of another type")
        if not all(0 <= cast("float", time_s) <= UNIX_S_MAX for time_s in n.values()):
            raise ValueError("a time that no calendar has")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, error) from error
    texts, times = cast("dict[str, str]", t), cast("dict[str, float]", n)
    return Facts(
        kind,
        texts["name"],
        texts["role"],
        texts["coordinator"],
        texts["server_name"],
        times["not_before_unix_s"],
        times["not_after_unix_s"],
    )


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is damaged ({error}).", "Join again, or restore the folder from a backup.")


def _missing(path: Path) -> ConfigError:
    return ConfigError(f"{path} is missing.", "Join again, or restore the folder from a backup.")


def _check_mode(path: Path) -> None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError as error:
        raise _missing(path) from error
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:04o}).", f"chmod 600 {path}; join again if others have read it.")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(PEM_BYTES_MAX)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Correct its rights.") from error


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _date(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))
