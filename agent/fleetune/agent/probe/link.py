"""Which network interfaces lead to the coordinator."""

from __future__ import annotations

import ipaddress
from pathlib import Path

_ROUTE_UP = 0x1


def interfaces_towards(host: str, root: Path = Path("/")) -> tuple[str, ...]:
    """Names of the interfaces that packets for `host` may leave by; empty where nothing tells.

    An IPv4 address is looked up in the routing table. For a name the default routes count: resolving it could block for seconds.
    """
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return ("lo",) if host.lower() == "localhost" else _default_routes(root)
    if address.is_loopback:
        return ("lo",)
    if isinstance(address, ipaddress.IPv4Address):
        return _routes_to(address, root)
    return _default_routes(root)


def _routes_to(address: ipaddress.IPv4Address, root: Path) -> tuple[str, ...]:
    """Interface of the longest matching prefix, and among equals of the smallest metric."""
    best: tuple[int, int, str] | None = None
    for name, network, metric in _routes(root):
        if address in network and (best is None or (-network.prefixlen, metric, name) < best):
            best = (-network.prefixlen, metric, name)
    return (best[2],) if best else ()


def _default_routes(root: Path) -> tuple[str, ...]:
    """The default interface of each address family that has one: a name may resolve to either."""
    names: dict[str, None] = {}
    fours = sorted((metric, name) for name, network, metric in _routes(root) if network.prefixlen == 0)
    if fours:
        names[fours[0][1]] = None
    sixes: list[tuple[int, str]] = []
    for line in _lines(root / "proc/net/ipv6_route"):
        words = line.split()
        # destination, its prefix length, source, its prefix length, next hop, metric, references, uses, flags, interface
        if len(words) == 10 and words[1] == "00" and words[9] != "lo" and int(words[8], 16) & _ROUTE_UP:
            sixes.append((int(words[5], 16), words[9]))
    if sixes:
        names[min(sixes)[1]] = None
    return tuple(names)


def _routes(root: Path) -> list[tuple[str, ipaddress.IPv4Network, int]]:
    """(interface, network, metric) of each IPv4 route that is up."""
    routes: list[tuple[str, ipaddress.IPv4Network, int]] = []
    for line in _lines(root / "proc/net/route")[1:]:
        # interface, destination, gateway, flags, references, uses, metric, mask, ...
        words = line.split()
        if len(words) >= 8 and int(words[3], 16) & _ROUTE_UP:
            network = ipaddress.IPv4Network((_little_endian(words[1]), str(_little_endian(words[7]))), strict=False)
            routes.append((words[0], network, int(words[6])))
    return routes


def _little_endian(text: str) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(bytes.fromhex(text)[::-1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
