"""Options of channels: gRPC passes over a name that it does not know, so nothing else would tell that one was dropped."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fleetune.wire import channel


def test_the_installed_grpc_knows_every_option_by_name() -> None:
    spec = find_spec("grpc._cython.cygrpc")
    assert spec is not None and spec.origin is not None
    library = Path(spec.origin).read_bytes()
    names = {name for name, _ in (*channel.server_options(), *channel.channel_options())}
    assert {name for name in names if name.encode() + b"\0" not in library} == set()


def test_what_a_connection_keeps_for_reading_is_bounded_on_both_sides() -> None:
    name = "grpc.experimental.tcp_max_read_buffer_size"
    assert dict(channel.server_options())[name] == channel.SERVER_READ_BYTES < 12 * 1024
    assert dict(channel.channel_options())[name] == channel.CLIENT_READ_BYTES
