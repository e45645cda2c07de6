"""The line that an operator pastes on a board: where the coordinator is, by which root to know it, and the token."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field

from fleetune.errors import ConfigError
from fleetune.wire.channel import split_address

PREFIX = "ft1"
EXAMPLE = "ft1/192.0.2.7:7433/7434/ROOT-FINGERPRINT/TOKEN"

_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}", re.ASCII)


@dataclass(frozen=True)
class JoinLine:
    """What the line says. Slashes part it, so no shell needs quotes around it."""

    address: str
    """HOST:PORT of the coordinator."""
    join_port: int
    """Port of the same host that answers those who have no certificate."""
    root_sha256: bytes
    """Of the DER of the root that the coordinator's certificate comes from: 32 bytes."""
    token: str = field(repr=False)

    @property
    def join_address(self) -> str:
        return f"{split_host(self.address)}:{self.join_port}"

    def text(self) -> str:
        fingerprint = base64.urlsafe_b64encode(self.root_sha256).rstrip(b"=").decode("ascii")
        return f"{PREFIX}/{self.address}/{self.join_port}/{fingerprint}/{self.token}"


def split_host(address: str) -> str:
    """The host of HOST:PORT, with the brackets of an IPv6 one."""
    return address.rpartition(":")[0]


def parse(text: str) -> JoinLine:
    """The line's parts. ConfigError says what is wrong with it and never repeats the token."""
    parts = text.strip().split("/")
    if parts[0] != PREFIX:
        raise _wrong(f"it does not begin with {PREFIX}/")
    if len(parts) != 5:
        raise _wrong(f"it has {len(parts)} parts instead of 5")
    _, address, port, fingerprint, token = parts
    try:
        split_address(address)
    except ValueError as error:
        raise _wrong(str(error)) from error
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise _wrong(f"{port[:10]!r} is no port")
    try:
        root = base64.urlsafe_b64decode(fingerprint + "=" * (-len(fingerprint) % 4))
    except (binascii.Error, ValueError) as error:
        raise _wrong("the fingerprint is damaged") from error
    if len(root) != 32:
        raise _wrong("the fingerprint is cut")
    if _TOKEN.fullmatch(token) is None:
        raise _wrong("the token is damaged")
    return JoinLine(address, int(port), root, token)


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"The join line cannot be used: {what}.", f"Paste it whole, as `fleetune token create` printed it: {EXAMPLE}.")
