"""Why a coordinator that is there does not take this agent: a handshake of our own, since gRPC tells no more than that a socket closed."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass
from pathlib import Path

from fleetune.waiting import within
from fleetune.wire import channel, identity
from fleetune.wire.identity import Identity

LOOK_S = 5.0
AGAIN_S = 1.0
"""A coordinator that is killed in the middle of a handshake closes the connection, too; it does not do so twice."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
"""What begins an HTTP/2 connection; a coordinator that takes our certificate answers with settings of its own."""


@dataclass(frozen=True)
class Finding:
    """`refused` is empty where the coordinator is away, slow or sound: then only patience helps."""

    refused: str = ""
    remedy: str = ""


SOUND = Finding()


class _ClosedError(Exception):
    """The other side hung up once the handshake was through from here, which is when it has seen our certificate."""


async def look(address: str, own: Identity, folder: Path) -> Finding:
    """What stands in the way at `address`, after one or two connections. Raises nothing."""
    try:
        context = _context(own, folder)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        return Finding(f"the identity in {folder} cannot be used: {error}", "Join again with a new token: `fleetune-agent join --again`.")
    finding, certain = await _once(address, own, context)
    if not finding.refused or certain:
        return finding
    await asyncio.sleep(AGAIN_S)
    return (await _once(address, own, context))[0]


def _context(own: Identity, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=own.roots.decode("ascii"))
    context.load_cert_chain(folder / identity.CERTIFICATE_FILE, folder / identity.KEY_FILE)
    return context


async def _once(address: str, own: Identity, context: ssl.SSLContext) -> tuple[Finding, bool]:
    try:
        return await within(LOOK_S, _shake(address, own, context)), True
    except ssl.SSLCertVerificationError as error:
        return _wrong_server(address, error.verify_message), True
    except ssl.SSLEOFError:
        # Before our certificate was seen: a proxy or a tunnel whose other end is away does so.
        return SOUND, True
    except ssl.SSLError as error:
        return _strange(address, own, error.reason or ""), True
    except _ClosedError:
        return _closed(address, own), False
    except (OSError, asyncio.TimeoutError):
        return SOUND, True


async def _shake(address: str, own: Identity, context: ssl.SSLContext) -> Finding:
    host, port = channel.split_address(address)
    name = own.facts.server_name or host.strip("[]")
    reader, writer = await asyncio.open_connection(host.strip("[]"), port, ssl=context, server_hostname=name)
    try:
        writer.write(_PREFACE)
        try:
            answer = await reader.read(1)
        except ConnectionError:
            answer = b""
        if not answer:
            raise _ClosedError
        return SOUND
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await within(1.0, writer.wait_closed())


def _closed(address: str, own: Identity) -> Finding:
    return Finding(
        f"{address} closes the connection without a word when it sees the certificate of {own.facts.name!r}: it is from another "
        "authority, or over by the coordinator's clock",
        "Compare the clocks of both machines; else join again with a new token: `fleetune-agent join --again`.",
    )


def _wrong_server(address: str, why: str) -> Finding:
    return Finding(
        f"what answers at {address} has no certificate that this agent trusts ({why.rstrip('.')}): another coordinator, one whose "
        "authority was made anew, or a wrong clock on one of the two machines",
        "Check the address and both clocks; if the authority was made anew, join again with a new token: `fleetune-agent join --again`.",
    )


def _strange(address: str, own: Identity, reason: str) -> Finding:
    if "ALERT" in reason:
        return Finding(
            f"{address} refuses the certificate of {own.facts.name!r} ({reason.lower().replace('_', ' ')})",
            "Compare the clocks of both machines; else join again with a new token: `fleetune-agent join --again`.",
        )
    return Finding(
        f"what answers at {address} does not speak TLS ({reason.lower().replace('_', ' ') or 'no reason given'}): a coordinator with "
        "--plaintext, or another program",
        "Check the port; on the coordinator's machine, `fleetune serve` without --plaintext.",
    )
