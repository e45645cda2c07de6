"""Reading and writing the rows of who belongs to the fleet: tokens, certificates, revoked names, quarantine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, cast

from sqlalchemy import Connection, Row, delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from fleetune.coordinator.principal import Role
from fleetune.coordinator.store import schema
from fleetune.coordinator.tokens import Holder, Token

Kind = Literal["agent", "operator"]


@dataclass(frozen=True)
class CertificateRow:
    """A certificate that was given out. Times are Unix seconds, 0 for never; `role` counts as in Role."""

    fingerprint: str
    kind: Kind
    name: str
    device_id: str
    role: int
    authority: str
    """Fingerprint of the root that signed it."""
    roots: str
    """Digest of the roots that went with it."""
    token_id: str
    not_before_unix_s: float
    not_after_unix_s: float
    issued_unix_s: float
    used_unix_s: float = 0.0
    revoked_unix_s: float = 0.0

    def holder(self) -> Holder:
        return Holder(self.fingerprint, self.name, self.device_id, self.token_id, self.used_unix_s > 0, self.revoked_unix_s > 0)


def add_certificate(tx: Connection, row: CertificateRow) -> None:
    tx.execute(insert(schema.certificates).values(**row.__dict__))


def load_certificates(connection: Connection) -> list[CertificateRow]:
    """All of them, the oldest first."""
    rows = connection.execute(select(schema.certificates).order_by(schema.certificates.c.issued_unix_s))
    return [_certificate(row) for row in rows]


def certificates_of_name(connection: Connection, kind: str, name: str) -> list[CertificateRow]:
    columns = schema.certificates.c
    rows = connection.execute(select(schema.certificates).where(columns.kind == kind, columns.name == name))
    return [_certificate(row) for row in rows]


def certificates_of_device(connection: Connection, device_id: str) -> list[CertificateRow]:
    if not device_id:
        return []
    rows = connection.execute(select(schema.certificates).where(schema.certificates.c.device_id == device_id))
    return [_certificate(row) for row in rows]


def revoke_certificates(tx: Connection, fingerprints: Iterable[str], now_unix_s: float) -> None:
    """Those that are revoked already keep their time."""
    columns = schema.certificates.c
    mine = update(schema.certificates).where(columns.fingerprint.in_(list(fingerprints)), columns.revoked_unix_s == 0)
    tx.execute(mine.values(revoked_unix_s=now_unix_s))


def note_use(tx: Connection, fingerprint: str, now_unix_s: float) -> None:
    tx.execute(update(schema.certificates).where(schema.certificates.c.fingerprint == fingerprint).values(used_unix_s=now_unix_s))


def drop_certificates(tx: Connection, fingerprints: Iterable[str]) -> None:
    tx.execute(delete(schema.certificates).where(schema.certificates.c.fingerprint.in_(list(fingerprints))))


def add_token(tx: Connection, token: Token) -> None:
    tx.execute(insert(schema.tokens).values(**{**token.__dict__, "role": int(token.role)}))


def load_tokens(connection: Connection) -> list[Token]:
    """All of them, the oldest first."""
    rows = connection.execute(select(schema.tokens).order_by(schema.tokens.c.created_unix_s))
    return [_token(row) for row in rows]


def save_token(tx: Connection, token: Token) -> None:
    """What changes of a token: the uses that are left, and whether it is revoked."""
    mine = update(schema.tokens).where(schema.tokens.c.digest == token.digest)
    tx.execute(mine.values(uses_left=token.uses_left, revoked_unix_s=token.revoked_unix_s))


def drop_tokens(tx: Connection, expired_before_unix_s: float) -> None:
    tx.execute(delete(schema.tokens).where(schema.tokens.c.expires_unix_s < expired_before_unix_s))


def revoke_identity(tx: Connection, kind: str, name: str, reason: str, now_unix_s: float) -> None:
    tx.execute(
        upsert(schema.revoked_identities).values(kind=kind, name=name, revoked_unix_s=now_unix_s, reason=reason).on_conflict_do_nothing()
    )


def load_revoked_identities(connection: Connection) -> set[tuple[str, str]]:
    """Kind and name."""
    return {(cast(str, row.kind), cast(str, row.name)) for row in connection.execute(select(schema.revoked_identities))}


def device_called(connection: Connection, name: str) -> str:
    """The id of the device that the fleet knows under this name, or an empty string."""
    return connection.execute(select(schema.devices.c.device_id).where(schema.devices.c.name == name)).scalar() or ""


def bind_device(tx: Connection, device_id: str, name: str, now_unix_s: float) -> None:
    """From now on `name` is the device `device_id`, with what the fleet knows of that name: counts, quarantine."""
    devices = schema.devices.c
    known = device_called(tx, name)
    if known == device_id:
        return
    if known:
        tx.execute(delete(schema.devices).where(devices.device_id == device_id))
        tx.execute(update(schema.devices).where(devices.device_id == known).values(device_id=device_id))
        return
    row = {"device_id": device_id, "name": name, "first_seen_unix_s": now_unix_s, "last_seen_unix_s": 0.0, "hello": b""}
    statement = upsert(schema.devices).values(**row)
    tx.execute(statement.on_conflict_do_update(index_elements=["device_id"], set_={"name": name}))


def set_quarantine(tx: Connection, device_id: str, reason: str) -> None:
    """An empty reason ends it."""
    tx.execute(update(schema.devices).where(schema.devices.c.device_id == device_id).values(quarantine=reason))


def load_quarantine(connection: Connection) -> dict[str, str]:
    """Device id -> reason, of the devices in quarantine."""
    devices = schema.devices.c
    rows = connection.execute(select(devices.device_id, devices.quarantine).where(devices.quarantine != ""))
    return {cast(str, row.device_id): cast(str, row.quarantine) for row in rows}


def _certificate(row: Row[tuple[object, ...]]) -> CertificateRow:
    return CertificateRow(**row._mapping)  # pyright: ignore[reportPrivateUsage]  # SQLAlchemy's public name for it


def _token(row: Row[tuple[object, ...]]) -> Token:
    token = Token(**row._mapping)  # pyright: ignore[reportPrivateUsage]
    return replace(token, role=Role(token.role))
