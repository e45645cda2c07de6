"""The roster: who belongs to the fleet, on disk and in memory. Every change is one transaction, then the memory follows."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from fleetune.coordinator import tokens
from fleetune.coordinator.principal import Principal, Role
from fleetune.coordinator.store import copies, identities, records
from fleetune.coordinator.store.db import Database
from fleetune.coordinator.store.identities import CertificateRow, Kind
from fleetune.coordinator.tokens import Denied, Token, Wish
from fleetune.errors import ConfigError, DiskFullError, FleetuneError

if TYPE_CHECKING:
    from fleetune.coordinator.authority import Authority, Issued

log = logging.getLogger("fleetune.roster")

BACKDATE_S = 300.0
"""As the authority does it; that module is loaded only where there is one."""

KEPT_S = 90 * 86_400.0
"""Ended certificates and tokens stay in the lists for so long; the newest of a name stays for good, since it holds the name."""

RENEWALS_MAX = 10
RENEWALS_IN_S = 3600.0
"""A device needs one certificate in weeks: more is a loop, and each is a row."""

T = TypeVar("T")


class RosterError(FleetuneError):
    """Why the roster does not do what it was asked; `kind` tells how to answer."""

    def __init__(self, kind: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.kind = kind
        """token, name, exists, invalid, request, unknown, revoked, busy or off"""


@dataclass(frozen=True)
class Enrolled:
    """A certificate that was given out, with what its owner needs."""

    row: CertificateRow
    certificate: bytes
    """PEM."""
    roots: bytes
    """PEM."""
    replaced: bool = False
    """Whether certificates of the same name ended by it."""


@dataclass(frozen=True)
class Revoked:
    certificates: int
    device_ids: tuple[str, ...]


class Roster:
    """Answers from memory whether a certificate stands, and decides on disk who gets one.

    `authority` None: the certificates are made elsewhere, or there are none. Then names alone can be revoked.
    """

    def __init__(
        self, database: Database, authority: Authority | None, certificate_days: float, wall: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._days = certificate_days
        self._wall = wall
        self._authority = authority
        self._rows: dict[str, CertificateRow] = {}
        self._revoked_names: set[tuple[str, str]] = set()
        self._newest: dict[str, str] = {}
        # Device id -> fingerprint.
        self._lost: tuple[float, float] | None = None
        self._running: set[asyncio.Task[object]] = set()
        self.quarantined: dict[str, str] = {}
        """Device id -> reason. The registry reads this very dictionary."""

    @property
    def authority(self) -> Authority | None:
        return self._authority

    def trust(self, authority: Authority) -> None:
        """Sign with this one from now on: the folder was changed."""
        self._authority = authority

    async def open(self) -> None:
        """Read the tables; what ended long ago goes."""
        now = self._wall()
        rows = await self._database.read(identities.load_certificates)
        self._remember(rows)
        holding = {(row.kind, row.name): row.fingerprint for row in rows}
        old = [r for r in rows if r.not_after_unix_s < now - KEPT_S and holding[r.kind, r.name] != r.fingerprint]
        if old:
            await self._database.try_write(lambda tx: identities.drop_certificates(tx, [r.fingerprint for r in old]))
            for row in old:
                del self._rows[row.fingerprint]
        lost = await self._database.read(lambda connection: records.read_meta(connection, records.LOST_KEY))
        if lost is not None:
            begin, end = lost.split()
            self._lost = (float(begin), float(end))
        self._revoked_names = await self._database.read(identities.load_revoked_identities)
        self.quarantined.update(await self._database.read(identities.load_quarantine))

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.gather(*self._running, return_exceptions=True)

    # -- asked at every call, answered from memory

    def standing(self, principal: Principal) -> str:
        """Why this certificate is not taken although it is sound, for a person; empty where it is."""
        if principal.kind == "local":
            return ""
        if (principal.kind, principal.name) in self._revoked_names:
            return f"{principal.kind} {principal.name} was revoked"
        if self._authority is None:
            return ""
        row = self._rows.get(principal.fingerprint)
        if row is None:
            row = self._adopted(principal)
        if row is None:
            return "its certificate is not in this coordinator's list"
        if row.revoked_unix_s:
            return "its certificate was revoked"
        if not row.used_unix_s:
            self._note_use(row)
        return ""

    def newest_of_device(self, device_id: str) -> CertificateRow | None:
        """The last certificate that was given to this device, revoked or not."""
        return self._rows.get(self._newest.get(device_id, ""))

    def is_revoked(self, device_id: str, name: str) -> bool:
        """Whether none of the device's certificates is taken any more."""
        newest = self.newest_of_device(device_id)
        return ("agent", name) in self._revoked_names or (newest is not None and newest.revoked_unix_s > 0)

    def certificates(self) -> list[CertificateRow]:
        """All, the oldest first."""
        return sorted(self._rows.values(), key=lambda row: row.issued_unix_s)

    # -- joining and renewing

    async def join(self, secret: str, wish: Wish, request: bytes, source: str) -> Enrolled:
        """Trade a token for a certificate, or for the one whose answer was lost. Exactly as many succeed as the token has uses.

        `source` is where it comes from, for the audit log.

        RosterError of kind token, name, exists, invalid or request; off without an authority; DiskFullError.
        """
        authority = self._needed()

        def enrol(tx: Connection) -> tuple[Enrolled, tuple[str, ...], dict[str, str]]:
            now = self._wall()
            token = tokens.find(identities.load_tokens(tx), secret)
            same_name = identities.certificates_of_name(tx, token.kind, wish.name) if token is not None else []
            same_device = identities.certificates_of_device(tx, wish.device_id) if token is not None else []
            known = identities.device_called(tx, wish.name) if wish.device_id else ""
            verdict = tokens.decide(token, wish, [r.holder() for r in same_name], [r.holder() for r in same_device], known, now)
            if isinstance(verdict, Denied):
                raise RosterError(verdict.kind, verdict.message)
            assert token is not None
            issued = _signed(authority, request, token.kind, wish.name, wish.device_id, token.role, self._days, now)
            made = _row(issued, authority, token.kind, wish.name, wish.device_id, token.role, token.token_id, now)
            identities.revoke_certificates(tx, verdict.revoke, now)
            identities.add_certificate(tx, made)
            if verdict.spend:
                identities.save_token(tx, replace(token, uses_left=token.uses_left - 1))
            if wish.device_id:
                identities.bind_device(tx, wish.device_id, wish.name, now)
            how = "again, the answer was lost" if not verdict.spend else "in place of the one before" if verdict.revoke else "new"
            detail = f"token={token.token_id} certificate={made.fingerprint[:16]} {how}"
            self._audit(tx, source, "join", f"{token.kind} {wish.name}", detail)
            replaced = verdict.spend and bool(verdict.revoke)
            # Of a name that another device took over, the quarantine goes with the name.
            enrolled = Enrolled(made, issued.certificate, authority.roots_pem, replaced)
            return enrolled, verdict.revoke, identities.load_quarantine(tx)

        def follow(result: tuple[Enrolled, tuple[str, ...], dict[str, str]]) -> None:
            self._end(result[1])
            self._remember([result[0].row])
            self.quarantined.clear()
            self.quarantined.update(result[2])

        return (await self._change(enrol, follow))[0]

    async def renew(self, principal: Principal, request: bytes) -> Enrolled:
        """A new certificate for the identity of the old one, which stays good until it ends.

        RosterError of kind revoked, request or busy; off without an authority; DiskFullError.
        """
        authority = self._needed()

        def again(tx: Connection) -> Enrolled:
            now = self._wall()
            old = self._rows.get(principal.fingerprint)
            if old is None or old.revoked_unix_s:
                raise RosterError("revoked", "this certificate was revoked")
            given = identities.certificates_of_name(tx, old.kind, old.name)
            # Read once more: a revocation may have been written since this call was let in.
            if any(row.fingerprint == old.fingerprint and row.revoked_unix_s for row in given):
                raise RosterError("revoked", "this certificate was revoked")
            if sum(row.issued_unix_s > now - RENEWALS_IN_S for row in given) >= RENEWALS_MAX:
                raise RosterError("busy", f"{old.name} was given {RENEWALS_MAX} certificates within an hour; try again later")
            role = Role(old.role)
            issued = _signed(authority, request, old.kind, old.name, old.device_id, role, self._days, now)
            made = _row(issued, authority, old.kind, old.name, old.device_id, role, "", now)
            identities.add_certificate(tx, made)
            self._audit(tx, str(principal), "renew", f"{old.kind} {old.name}", f"certificate={made.fingerprint[:16]}")
            return Enrolled(made, issued.certificate, authority.roots_pem)

        return await self._change(again, lambda enrolled: self._remember([enrolled.row]))

    # -- what administrators say

    async def create_token(self, token: Token, actor: str) -> None:
        """RosterError busy where too many are good already."""

        def add(tx: Connection) -> None:
            now = self._wall()
            identities.drop_tokens(tx, now - KEPT_S)
            known = identities.load_tokens(tx)
            if sum(t.is_good(now) and t.uses_left > 0 for t in known) >= tokens.TOKENS_MAX:
                raise RosterError("busy", f"{tokens.TOKENS_MAX} tokens are good already; revoke some with `fleetune token revoke ID`")
            if any(t.token_id == token.token_id for t in known):
                raise RosterError("busy", "two tokens would have the same id; try again")
            identities.add_token(tx, token)
            role = f" role={token.role.name.lower()}" if token.kind == "operator" else ""
            detail = f"{token.kind}{role} name={token.name or 'any'} replace={token.replace} uses={token.uses}"
            self._audit(tx, actor, "token create", token.token_id, f"{detail} ttl_s={token.expires_unix_s - token.created_unix_s:.0f}")

        await self._change(add, _nothing)

    async def tokens(self) -> list[Token]:
        """All of the last months, the oldest first."""
        return await self._database.read(identities.load_tokens)

    async def revoke_token(self, token_id: str, actor: str) -> Token:
        """RosterError unknown."""

        def end(tx: Connection) -> Token:
            found = [t for t in identities.load_tokens(tx) if t.token_id == token_id]
            if not found:
                raise RosterError("unknown", f"no token has the id {token_id!r}; `fleetune token list` shows all")
            token = found[0]
            if not token.revoked_unix_s:
                token = replace(token, revoked_unix_s=self._wall())
                identities.save_token(tx, token)
            self._audit(tx, actor, "token revoke", token.token_id, "")
            return token

        return await self._change(end, _nothing)

    async def revoke(self, kind: Kind, name: str, reason: str, actor: str) -> Revoked:
        """None of the name's certificates is taken from the moment that this returns. RosterError unknown."""

        def end(tx: Connection) -> tuple[list[str], tuple[str, ...], bool]:
            now = self._wall()
            rows = identities.certificates_of_name(tx, kind, name)
            device_id = identities.device_called(tx, name) if kind == "agent" else ""
            by_name = self._authority is None
            if not rows and not device_id and not by_name:
                raise RosterError("unknown", f"no {'device' if kind == 'agent' else 'operator'} called {name!r} has a certificate")
            good = [row.fingerprint for row in rows if not row.revoked_unix_s]
            identities.revoke_certificates(tx, good, now)
            if by_name:
                identities.revoke_identity(tx, kind, name, reason, now)
            self._audit(tx, actor, "revoke", f"{kind} {name}", f"certificates={len(good)} {reason}".strip())
            ids = {row.device_id for row in rows} | {device_id}
            return good, tuple(sorted(ids - {""})), by_name

        def follow(result: tuple[list[str], tuple[str, ...], bool]) -> None:
            self._end(result[0])
            if result[2]:
                self._revoked_names.add((kind, name))

        good, ids, _ = await self._change(end, follow)
        return Revoked(len(good), ids)

    async def set_quarantine(self, name: str, reason: str, actor: str) -> str:
        """No tasks for the device until it is released (an empty reason); its id. RosterError unknown."""

        def set_it(tx: Connection) -> str:
            device_id = identities.device_called(tx, name)
            if not device_id:
                raise RosterError("unknown", f"no device is called {name!r}; `fleetune devices` lists them")
            identities.set_quarantine(tx, device_id, reason)
            self._audit(tx, actor, "quarantine" if reason else "release", f"agent {name}", reason)
            return device_id

        def follow(device_id: str) -> None:
            self.quarantined.pop(device_id, None)
            if reason:
                self.quarantined[device_id] = reason

        return await self._change(set_it, follow)

    async def note_refusal(self, actor: str, action: str, subject: str, detail: str) -> None:
        """A line of the audit log for what was not done; a full disk keeps nobody from being refused."""
        await self._database.try_write(lambda tx: self._audit(tx, actor, action, subject, detail, "refused"))

    def note_more_refusals(self, actor: str, action: str, subject: str, detail: str) -> None:
        """The same for many of them, with nobody who waits for it."""
        self._kept(self.note_refusal(actor, action, subject, detail))

    # -- small parts

    async def _change(self, change: Callable[[Connection], T], follow: Callable[[T], None]) -> T:
        """Write, then let the memory follow, also where the caller has gone: the two must not part."""

        async def run() -> T:
            try:
                result = await self._database.write(change)
            except OperationalError as error:
                if not isinstance(error.orig, Exception) or not copies.is_full(error.orig):
                    raise
                raise DiskFullError("the coordinator's disk is full.", "Make room there; `fleetune gc` helps.") from error
            follow(result)
            return result

        return await asyncio.shield(self._kept(run()))

    def _kept(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name="roster")
        self._running.add(task)
        task.add_done_callback(self._let_go)
        return task

    def _let_go(self, task: asyncio.Task[object]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; where nobody did, it is no complaint of the loop

    def _note_use(self, row: CertificateRow) -> None:
        now = self._wall()
        self._rows[row.fingerprint] = replace(row, used_unix_s=now)
        if row.token_id:  # only then it matters: the token's owner cannot ask for this one again
            self._kept(self._database.try_write(lambda tx: identities.note_use(tx, row.fingerprint, now)))

    def _adopted(self, principal: Principal) -> CertificateRow | None:
        """After a restore: a certificate from the time that was lost, of somebody whom the backup knows and who is not revoked.

        It was renewed then, and is of our authority, since the handshake found it sound. Whoever joined in that time is not known.
        """
        made = principal.begins_unix_s + BACKDATE_S
        # Certificates count in whole seconds: one that was made right after the backup may seem to be from a moment before it.
        if self._lost is None or not self._lost[0] - 1.0 <= made <= self._lost[1]:
            return None
        known = [
            row
            for row in self._rows.values()
            if (row.kind, row.name, row.device_id, row.role) == (principal.kind, principal.name, principal.device_id, int(principal.role))
        ]
        if not known or any(row.revoked_unix_s for row in known):
            return None
        now = self._wall()
        newest = max(known, key=lambda row: row.issued_unix_s)
        # Its end is not known here, and the gate has looked at it. Of unknown roots, so that it is renewed at once.
        row = replace(
            newest, fingerprint=principal.fingerprint, authority="", roots="", token_id="", issued_unix_s=made, used_unix_s=now,
            not_before_unix_s=principal.begins_unix_s, not_after_unix_s=made + self._days * 86_400.0,
        )  # fmt: skip
        self._remember([row])
        self._kept(self._database.try_write(lambda tx: identities.add_certificate(tx, row)))
        log.warning("%s has a certificate from the time that the restore has lost; it is taken", principal)
        return row

    def _needed(self) -> Authority:
        if self._authority is None:
            raise RosterError("off", "this coordinator has no authority of its own: whoever made its certificates makes new ones")
        return self._authority

    def _remember(self, rows: Iterable[CertificateRow]) -> None:
        for row in rows:
            self._rows[row.fingerprint] = row
            newest = self.newest_of_device(row.device_id)
            if row.device_id and (newest is None or newest.issued_unix_s <= row.issued_unix_s):
                self._newest[row.device_id] = row.fingerprint

    def _end(self, fingerprints: Sequence[str]) -> None:
        now = self._wall()
        for mark in fingerprints:
            row = self._rows.get(mark)
            if row is not None and not row.revoked_unix_s:
                self._rows[mark] = replace(row, revoked_unix_s=now)

    def _audit(self, tx: Connection, actor: str, action: str, subject: str, detail: str, outcome: str = "done") -> None:
        records.add_audit(tx, records.AuditRow(self._wall(), actor, action, subject, outcome, detail))


def made_here(issued: Issued, authority: Authority, name: str, role: Role, now_unix_s: float) -> CertificateRow:
    """The row of an operator's certificate that was signed on the coordinator's own machine."""
    return _row(issued, authority, "operator", name, "", role, "", now_unix_s)


def roots_digest(roots: bytes) -> str:
    """Tells which roots went with a certificate."""
    return hashlib.sha256(roots).hexdigest()


def _row(
    issued: Issued, authority: Authority, kind: Kind, name: str, device_id: str, role: Role, token_id: str, now_unix_s: float
) -> CertificateRow:
    return CertificateRow(
        issued.fingerprint,
        kind,
        name,
        device_id,
        int(role),
        issued.authority,
        roots_digest(authority.roots_pem),
        token_id,
        issued.not_before_unix_s,
        issued.not_after_unix_s,
        now_unix_s,
    )


def _signed(
    authority: Authority, request: bytes, kind: Kind, name: str, device_id: str, role: Role, days: float, now_unix_s: float
) -> Issued:
    try:
        if kind == "agent":
            return authority.sign_agent(request, name, device_id, days, now_unix_s)
        return authority.sign_operator(request, name, role, days, now_unix_s)
    except ConfigError as error:
        raise RosterError("request", str(error)) from error


def _nothing(_result: object) -> None:
    return
