"""STATE_DIR/tls: the authority's key, the trusted roots, the server's key and certificate, as files that are whole at any instant."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from fleetune.coordinator import authority
from fleetune.coordinator.authority import Authority
from fleetune.coordinator.faults import FolderInUseError
from fleetune.coordinator.store import copies
from fleetune.errors import ConfigError
from fleetune.wire import keys

FOLDER = "tls"
AUTHORITY_KEY, ROOTS, SERVER_KEY, SERVER_CERTIFICATE = "authority.key", "roots.pem", "server.key", "server.pem"

PREVIOUS_KEY = "authority.previous.key"
"""While the authority is being rotated: the key of the old root, from which the server's certificate still comes."""

ADDRESS = "address"
"""HOST:PORT that devices dial, as `fleetune init` was told; there may be none."""

REQUIRED = (AUTHORITY_KEY, ROOTS, SERVER_KEY, SERVER_CERTIFICATE)
KEPT = (*REQUIRED, PREVIOUS_KEY, ADDRESS)
"""Every file that a backup holds."""

LOCK = "lock"
FILE_BYTES_MAX = 256 * 1024
RENEW_AFTER = 2 / 3
"""Of the server certificate's life."""

_MAKING = f".{FOLDER}."


@dataclass(frozen=True)
class Material:
    """The folder's files, read and found to fit together."""

    authority: Authority
    """Signs whoever joins and renews."""
    previous: Authority | None
    """During a rotation: the old one."""
    server_key: bytes = field(repr=False)
    server_chain: bytes
    """The server's certificate, then the root that it comes from."""
    address: str

    @property
    def roots(self) -> bytes:
        return self.authority.roots_pem

    @property
    def server_root(self) -> str:
        """Hex SHA-256 of the DER of the root that the server's certificate comes from."""
        return authority.fingerprint(authority.certificates(self.server_chain)[-1])


def of(state_dir: Path) -> Path:
    return state_dir / FOLDER


def missing(state_dir: Path) -> list[str]:
    """Which of the files that a coordinator cannot do without are not there; all of them before `fleetune init`."""
    return [name for name in REQUIRED if not (of(state_dir) / name).is_file()]


def read(folder: Path) -> Material:
    """The folder's contents. ConfigError for what is missing, damaged, or can be read by others."""
    roots = _read(folder / ROOTS)
    signing = authority.load(_read_key(folder / AUTHORITY_KEY), roots)
    previous: Authority | None = None
    if (folder / PREVIOUS_KEY).is_file():
        found = authority.load(_read_key(folder / PREVIOUS_KEY), roots)
        # Equal where a rotation ended between its first two steps: then it has not begun.
        previous = found if found.fingerprint != signing.fingerprint else None
    key, chain = _read_key(folder / SERVER_KEY), _read(folder / SERVER_CERTIFICATE)
    if not authority.fits(key, chain):
        raise ConfigError(f"{folder / SERVER_CERTIFICATE} is not the certificate of {folder / SERVER_KEY}.", "Restore them from a backup.")
    return Material(signing, previous, key, chain, _address(folder))


def make(state_dir: Path, address: str, now_unix_s: float) -> None:
    """A new authority and the server's certificate: the whole folder, or none. FolderInUseError where there is one."""
    target = of(state_dir)
    for left in state_dir.glob(f"{_MAKING}*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=_MAKING, dir=state_dir))
    try:
        key, server_key = keys.make_key(), keys.make_key()
        roots = authority.make_root(key, now_unix_s)
        _write(aside / AUTHORITY_KEY, key)
        _write(aside / ROOTS, roots)
        _write(aside / SERVER_KEY, server_key)
        _write(aside / SERVER_CERTIFICATE, authority.load(key, roots).server_certificate(server_key, now_unix_s))
        if address:
            _write(aside / ADDRESS, f"{address}\n".encode())
        copies.sync(aside)
        try:
            os.rename(aside, target)  # refuses a folder that holds anything
        except OSError as error:
            if target.exists():
                raise FolderInUseError(f"{target} exists.", "Move it away first if this coordinator is to get a new authority.") from error
            raise
        copies.sync(state_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def mend(folder: Path, now_unix_s: float) -> bool:
    """Give the server a new certificate where its own is old or, after an interrupted rotation, of another key; False where it is well."""
    with _locked(folder):
        roots = _read(folder / ROOTS)
        signing = authority.load(_read_key(folder / AUTHORITY_KEY), roots)
        old_key = folder / PREVIOUS_KEY
        # Devices that have not renewed yet know the old root alone.
        by = authority.load(_read_key(old_key), roots) if old_key.is_file() else signing
        key, chain = _read_key(folder / SERVER_KEY), _read(folder / SERVER_CERTIFICATE)
        root = authority.signed_by_any(chain, authority.certificates(roots))
        if root is not None and authority.fits(key, chain) and now_unix_s < renew_unix_s(chain):
            return False
        _write(folder / SERVER_CERTIFICATE, by.server_certificate(key, now_unix_s))
        return True


def renew_unix_s(chain: bytes) -> float:
    """When the server's certificate, the first of `chain`, is to be renewed."""
    leaf = authority.certificates(chain)[0]
    begin, end = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    return begin + (end - begin) * RENEW_AFTER


def rotate(folder: Path, now_unix_s: float) -> Material:
    """Make a new root that signs from now on; the old one stays trusted, and the server's certificate its own.

    FolderInUseError while an earlier rotation is not finished. Interrupted anywhere, the folder is as before or as after.
    """
    with _locked(folder):
        material = read(folder)
        if material.previous is not None:
            raise FolderInUseError("the authority is being rotated already.", "Finish that with `fleetune ca rotate --finish`.")
        key = keys.make_key()
        # Only the signing root: a rotation that was cut short may have left one that has no key.
        roots = authority.make_root(key, now_unix_s) + authority.pem_of(material.authority.root)
        _write(folder / PREVIOUS_KEY, _read_key(folder / AUTHORITY_KEY))
        _write(folder / ROOTS, roots)
        _write(folder / AUTHORITY_KEY, key)
        return read(folder)


def finish(folder: Path, now_unix_s: float) -> Material:
    """Let the server's certificate come from the new root, and trust the old one no more. ConfigError where no rotation is under way."""
    with _locked(folder):
        material = read(folder)
        if material.previous is None:
            raise ConfigError("the authority is not being rotated.", "Begin with `fleetune ca rotate`.")
        server_key = keys.make_key()
        _write(folder / SERVER_KEY, server_key)
        _write(folder / SERVER_CERTIFICATE, material.authority.server_certificate(server_key, now_unix_s))
        _write(folder / ROOTS, authority.pem_of(material.authority.root))
        (folder / PREVIOUS_KEY).unlink()
        copies.sync(folder)
        return read(folder)


def copy(state_dir: Path, target: Path) -> None:
    """Put the folder's files as they fit together into `target`/tls; nothing where there is no folder."""
    folder = of(state_dir)
    if not folder.is_dir():
        return
    with _locked(folder):
        aside = target / FOLDER
        aside.mkdir(mode=0o700, exist_ok=True)
        for name in KEPT:
            if (folder / name).is_file():
                _write(aside / name, _read(folder / name))
            else:
                (aside / name).unlink(missing_ok=True)


def _address(folder: Path) -> str:
    try:
        return (folder / ADDRESS).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / ADDRESS} cannot be read: {error}.", "Correct it, or set `address`.") from error


def _read_key(path: Path) -> bytes:
    data = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{path} can be read by others (mode {mode:04o}).",
            f"chmod 600 {path}; if others have read it, rotate the authority with `fleetune ca rotate`.",
        )
    return data


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(FILE_BYTES_MAX)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing.", "Restore the folder tls/ from a backup.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Correct its rights.") from error


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        copies.sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def read_whole(folder: Path, patience_s: float) -> Material:
    """`read`, but not in the middle of somebody's writing: FolderInUseError where that takes longer than `patience_s`."""
    with _locked(folder, patience_s, fcntl.LOCK_SH):
        return read(folder)


@contextlib.contextmanager
def _locked(folder: Path, patience_s: float = 5.0, how: int = fcntl.LOCK_EX) -> Generator[None]:
    """One writer at a time: the coordinator renews its certificate, a person rotates the authority."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise FolderInUseError(f"{folder} is being changed by another process.", "Try again in a moment.") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
