"""How many files and sockets this process may have open, and how many of them connections may take."""

from __future__ import annotations

import resource

RESERVED = 768
"""For the database, blobs, spools, libraries and those who join: an upload must find a descriptor however many connections there are."""

CONNECTIONS_MIN = 64
CONNECTIONS_MAX = 100_000


def widen() -> int:
    """Raise the soft limit of this process to its hard one; the limit as it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + RESERVED if hard == resource.RLIM_INFINITY else min(hard, CONNECTIONS_MAX + RESERVED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # some systems have a lower limit beside the hard one
            return soft
        return wanted
    return soft


def connections_max() -> int:
    """Connections to take at once; more would leave none of the process's descriptors for files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return max(CONNECTIONS_MIN, min(soft - RESERVED, CONNECTIONS_MAX))
