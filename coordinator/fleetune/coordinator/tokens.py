"""Tokens: what they are, which of them lets somebody in, and how often somebody may try. Pure: the time is an argument."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fleetune.coordinator.principal import Role

TTL_S_MIN, TTL_S_MAX = 60.0, 30 * 86_400.0
USES_MAX = 1000
TOKENS_MAX = 1000
"""Tokens that are good at one time."""

ID_CHARACTERS = 8
TOKEN_CHARACTERS_MAX = 64

TRIES_PER_S = 10.0
"""From one address: a person at a board needs one, a script that unpacks twenty boards waits two seconds."""

ALL_TRIES_PER_S = 100.0
SOURCES_KEPT = 4096

Kind = Literal["agent", "operator"]
RefusalKind = Literal["token", "name", "exists", "invalid"]


@dataclass(frozen=True)
class Token:
    """What is kept of a token. Times are Unix seconds, 0 for never."""

    digest: str
    """Hex SHA-256 of the secret, which is kept nowhere."""
    kind: Kind
    role: Role
    name: str
    replace: bool
    uses: int
    uses_left: int
    created_unix_s: float
    expires_unix_s: float
    creator: str
    revoked_unix_s: float = 0.0

    @property
    def token_id(self) -> str:
        return self.digest[:ID_CHARACTERS]

    def is_good(self, now_unix_s: float) -> bool:
        """Whether it lets somebody in or may be tried again after a lost answer."""
        return not self.revoked_unix_s and now_unix_s < self.expires_unix_s


@dataclass(frozen=True)
class Holder:
    """A certificate that was given out, as far as it bears on who may join."""

    fingerprint: str
    name: str
    device_id: str
    token_id: str
    used: bool
    """Whether anybody has come in with it."""
    revoked: bool


@dataclass(frozen=True)
class Wish:
    """Who wants to join."""

    name: str
    device_id: str


@dataclass(frozen=True)
class Granted:
    """A certificate is to be made, and those in `revoke` are to end."""

    spend: bool
    """False: the answer to this very join was lost, and it has its use already."""
    revoke: tuple[str, ...]


@dataclass(frozen=True)
class Denied:
    kind: RefusalKind
    message: str


UNGOOD = Denied("token", "this token is not good: unknown, used up, expired or revoked")
"""One text for all: which of them it is helps only somebody who guesses."""


def make() -> str:
    """A new secret of 192 bits, safe in a shell and in a path."""
    return secrets.token_urlsafe(24)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def find(tokens: Iterable[Token], secret: str) -> Token | None:
    """The token of this secret. Compares with every one, in a time that tells nothing of them."""
    wanted = digest(secret).encode()
    found: Token | None = None
    for token in tokens:
        if hmac.compare_digest(token.digest.encode(), wanted):
            found = token
    return found


def decide(
    token: Token | None, wish: Wish, same_name: Sequence[Holder], same_device: Sequence[Holder], known_id: str, now_unix_s: float
) -> Granted | Denied:
    """Whether `wish` gets a certificate for this token.

    `same_name`: certificates of that name and the token's kind; `same_device`: those of that device id. `known_id`: the device id that
    the fleet knows under the name, or an empty string.
    """
    if token is None or not token.is_good(now_unix_s):
        return UNGOOD
    if (token.kind == "agent") != bool(wish.device_id):
        what = "a device, and this is an operator" if token.kind == "agent" else "an operator, and this is a device"
        return Denied("invalid", f"this token is for {what}")
    if token.name and token.name != wish.name:
        return Denied("name", f"this token is for another name than {wish.name!r}")
    lost = [h.fingerprint for h in same_name if _is_lost_answer(h, token, wish)]
    if lost:
        return Granted(False, tuple(lost))
    if token.uses_left < 1:
        return UNGOOD
    other = next((h for h in same_device if h.name != wish.name and not h.revoked), None)
    if wish.device_id and other is not None:
        return Denied("exists", f"this device is {other.name!r} in the fleet already; revoke that, or join under that name")
    taken = bool(same_name) or known_id not in ("", wish.device_id)
    if taken and not token.replace:
        what = "a device" if token.kind == "agent" else "an operator"
        return Denied(
            "exists", f"{what} called {wish.name!r} is in the fleet already; choose another name, or ask for a token made with --replace"
        )
    return Granted(True, tuple(h.fingerprint for h in same_name if not h.revoked))


def _is_lost_answer(holder: Holder, token: Token, wish: Wish) -> bool:
    """Somebody who has come in with the certificate has got the answer: whoever asks then is another one."""
    return holder.token_id == token.token_id and holder.device_id == wish.device_id and not holder.used and not holder.revoked


class Limiter:
    """How many tries a second are taken, from each source and from all: buckets that fill with time, for a bounded number of sources."""

    def __init__(self, per_source_s: float = TRIES_PER_S, of_all_s: float = ALL_TRIES_PER_S, sources_max: int = SOURCES_KEPT) -> None:
        self._rate = per_source_s
        self._sources_max = sources_max
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._all_rate = of_all_s
        self._all: tuple[float, float] = (of_all_s, 0.0)

    def allows(self, source: str, now_s: float) -> bool:
        """Take one try of this source. `now_s` is of a monotonic clock."""
        left, ok = _drawn(self._buckets.pop(source, (self._rate, now_s)), self._rate, now_s)
        self._buckets[source] = (left, now_s)
        if len(self._buckets) > self._sources_max:
            # The one that was silent for longest: its bucket is the fullest, and a source that is not known has a full one.
            self._buckets.popitem(last=False)
        if not ok:
            return False
        left, ok = _drawn(self._all, self._all_rate, now_s)
        self._all = (left, now_s)
        return ok

    def __len__(self) -> int:
        return len(self._buckets)


def _drawn(bucket: tuple[float, float], rate: float, now_s: float) -> tuple[float, bool]:
    """What is left of a bucket of one second's tries after one more, and whether there was one."""
    left = min(rate, bucket[0] + max(0.0, now_s - bucket[1]) * rate)
    return (left - 1.0, True) if left >= 1.0 else (left, False)


def source(peer: str) -> str:
    """The part of a gRPC peer ("ipv4:192.0.2.1:4000") that one machine cannot change at will: no port, of IPv6 the network of 64 bits."""
    family, _, rest = peer.partition(":")
    if family not in ("ipv4", "ipv6"):
        return family[:40]
    return source_of_host(rest.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")) or family


def source_of_host(host: str) -> str:
    """The same of a bare address; empty for what is none."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.IPv6Network((address, 64), strict=False))
