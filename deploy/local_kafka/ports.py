"""Ports of this machine: which are free, and which answer."""

from __future__ import annotations

import contextlib
import random
import socket

__all__ = ["answers", "free_ports", "is_free"]

# Below the ranges from which systems take the ports of outgoing connections, so that none of those is in the way.
PORTS = range(20_000, 32_000)


def is_free(port: int) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket() as probe:
        # As Java does: a port counts as free when only connections of an earlier server linger on it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_ports(count: int, without: set[int] | frozenset[int] = frozenset()) -> list[int]:
    """Free ports, drawn at random, none of them in `without`."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        if port not in without and is_free(port):
            found.append(port)
    return found


def answers(port: int) -> bool:
    """Whether something on this machine accepts a connection to the port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
