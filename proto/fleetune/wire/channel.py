"""gRPC options of both sides, set in one place with their reasons, and how a channel is opened."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import grpc
import grpc.aio

from fleetune.errors import ConfigError
from fleetune.wire.identity import Identity

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 3
"""What a minor version adds, an older peer leaves unset, and it is taken as it was before.

1: Hello tells rows to train on and rows to measure on apart (before: a data name has both); tasks held, outcomes and questions about
   uploads tell their epoch (before: the present one); a watch tells each round once it is committed (before: whoever watches asks).
2: Devices tell what their link carries and, asked by a task of kind MEASURE, what training costs them; uploads keep to a rate (before:
   such jobs are not given to an older agent, which does not know their method).
3: The coordinator sends the initial metadata of an upload when its turn comes, and an agent keeps the chunks of a longer update back until
   then (before: they fill the stream's window meanwhile).

Blobs are addressed by BLAKE3 in every numbered version; with other digests no task could be done, so that would be another major.
"""

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
"""A chunk is at most 1 MiB and a control message far less: whatever is larger is a mistake or an attack."""

CLIENT_WINDOW_BYTES = 4 * 1024 * 1024
"""What may be on its way to an agent in one stream: 40 MB/s at 100 ms, and the most that it takes of a busy agent's memory."""

SERVER_WINDOW_BYTES = 512 * 1024
"""The same towards the coordinator. An upload whose turn it is gets room for a whole chunk on top. What is lost on the way holds up all
that comes after it for two round trips and more: with half of this an uplink of 20 Mbit/s, 40 ms and 1 % loss stood still at times."""

CLIENT_READ_BYTES = 64 * 1024
"""What one read of a connection takes at most. gRPC doubles the buffer as long as reads fill it, up to what a window lets through, and each
connection keeps its own while it is idle: with chunks of 1 MiB that was 0.8 MiB for every device of the fleet."""

SERVER_READ_BYTES = 12_000
"""The same for the coordinator, which has two connections of each device. From 12 KiB on gRPC takes 64 KiB at a time, below it 8 KiB."""

SERVER_RECORD_BYTES = 4 * 1024
"""TLS records of the coordinator. Each connection has a buffer for one, of 16 KiB unless told otherwise."""

METADATA_BYTES_MAX = 8 * 1024

KEEPALIVE_S = 10.0
"""NAT tables of home routers forget an idle connection after 30 s and more."""

PING_TIMEOUT_S = 5.0
"""In grpcio 1.85 only `http2.ping_timeout_ms` notices a frozen peer; keepalive_timeout alone waits a minute."""

HANDSHAKE_S = 10.0
"""For the whole of a connection's beginning at either end: TCP, TLS and HTTP/2 take four round trips, and a small board seconds for TLS."""

BACKOFF_MIN_S = 0.2
BACKOFF_MAX_S = 5.0

IDLE_S = 300.0
"""A connection without calls for so long is closed, and the next call opens another; gRPC by itself waits half an hour. Of a device at rest
the one for bulk takes 100 KiB of the coordinator, and of the link a ping every 10 s. Opening it again takes a small board a second."""

Option = tuple[str, int | str]


def server_options() -> list[Option]:
    """Options of the coordinator's server."""
    return [
        *_common_options(),
        # Half of the agents' keep-alive, since pings may fire early; anything faster is told GOAWAY.
        ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
        # Pings bunch up on a busy machine; a GOAWAY for that would cut every stream of a sound peer.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_concurrent_streams", 100),
        ("grpc.http2.lookahead_bytes", SERVER_WINDOW_BYTES),
        ("grpc.experimental.tcp_max_read_buffer_size", SERVER_READ_BYTES),
        ("grpc.tsi.max_frame_size", SERVER_RECORD_BYTES),
        # A connection that does not finish its handshake holds a descriptor for no longer than this.
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
        # What channelz would tell of each connection, if anybody could ask: 1.5 KiB.
        ("grpc.enable_channelz", 0),
        # Two coordinators on one port would share its connections at random.
        ("grpc.so_reuseport", 0),
    ]


def channel_options() -> list[Option]:
    """Options of a channel that an agent or an operator opens."""
    return [
        *_common_options(),
        ("grpc.initial_reconnect_backoff_ms", int(BACKOFF_MIN_S * 1000)),
        # Not a pause, whatever its name says: the time that each try to connect gets at least.
        ("grpc.min_reconnect_backoff_ms", int(HANDSHAKE_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(BACKOFF_MAX_S * 1000)),
        ("grpc.client_idle_timeout_ms", int(IDLE_S * 1000)),
        # A connection of its own: channels with equal options otherwise share one, and bulk would starve heartbeats.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.lookahead_bytes", CLIENT_WINDOW_BYTES),
        ("grpc.experimental.tcp_max_read_buffer_size", CLIENT_READ_BYTES),
        # A proxy from the environment has no business between a board and its coordinator on the same network.
        ("grpc.enable_http_proxy", 0),
        ("grpc.channel_id", uuid.uuid4().hex),
    ]


def open_channel(address: str, identity: Identity | None = None) -> grpc.aio.Channel:
    """A channel to `address` ("host:port") with mutual TLS as `identity`; the caller closes it.

    None: plaintext, which ConfigError refuses to any host but loopback.
    """
    options = channel_options()
    if identity is None:
        if not is_loopback(address.rpartition(":")[0]):
            raise ConfigError(
                f"{address} is not this machine, and without an identity nothing on the way there would be encrypted.",
                "Join the fleet first; plaintext is for 127.0.0.1 alone.",
            )
        return grpc.aio.insecure_channel(address, options=options)
    if identity.facts.server_name:
        options.append(("grpc.ssl_target_name_override", identity.facts.server_name))
    credentials = grpc.ssl_channel_credentials(identity.roots, identity.key, identity.certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)


def is_loopback(host: str) -> bool:
    """True where nothing but this machine can reach `host`."""
    bare = host.strip("[]").lower()
    return bare in {"localhost", "::1"} or bare.startswith("127.")


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port" in its parts; ValueError says what is wrong."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"address {address!r} is not HOST:PORT with a port from 1 to 65535, for example 192.0.2.7:7433")
    return host, int(port)


def _common_options() -> Sequence[Option]:
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
        ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Left to itself gRPC widens a stream's window to tens of MiB, all of it memory of a receiver that is slower than its peer.
        ("grpc.http2.bdp_probe", 0),
    ]
