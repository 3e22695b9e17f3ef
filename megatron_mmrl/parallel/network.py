"""Which network interface leads from this host to another."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping

import psutil

_ANY_PORT = 9  # connecting a datagram socket sends nothing


def interface_towards(host: str) -> str:
    """The interface that this host's packets to ``host`` leave by; ``lo`` for an address of this host on loopback.

    Raises:
        ValueError: there is no such host, no way to it, or no interface has the address that packets leave from.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR={host} cannot be reached from {socket.gethostname()}: {error}; use a name or an address that "
            "every node knows"
        ) from error
    return interface_of(own, {name: [a.address for a in found] for name, found in psutil.net_if_addrs().items()})


def only_meant_here(host: str) -> bool:
    """Whether ``host`` is a name that stands for loopback on this host, and elsewhere perhaps for something else.

    Such is a host's own name where ``/etc/hosts`` gives it 127.0.1.1, as Debian's installer does.
    """
    if host == "localhost":
        return False
    found = {row[4][0] for row in socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)}
    return host not in found and all(ipaddress.ip_address(address).is_loopback for address in found)


def interface_of(address: str, interfaces: Mapping[str, Iterable[str]]) -> str:
    """The one of ``interfaces`` (name -> its addresses) that has ``address``. Raises ValueError: none has."""
    for name, addresses in interfaces.items():
        if address in (found.partition("%")[0] for found in addresses):  # fe80::1%eth0
            return name
    raise ValueError(
        f"no network interface has the address {address} that leads to MASTER_ADDR; name the interface in "
        "cluster.network_interface"
    )
