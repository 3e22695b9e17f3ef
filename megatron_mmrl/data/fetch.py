"""Images from the web, for ``mmrl data prepare --allow-http`` alone: bounded in time, size and hops, public hosts only.

The address that was checked is the address that is connected to: a name that resolves to a public address first and to
a private one a moment later gains nothing. Each redirect is a new address, checked anew. Proxies are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from urllib.parse import SplitResult, urljoin, urlsplit

from megatron_mmrl.data.errors import BadRowError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_READ_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """What one image may cost."""

    time_s: float = 20.0
    """For everything: resolving aside, connecting, redirects and the last byte."""
    size_bytes: int = 32 << 20
    redirects: int = 3


def is_public(address: Address) -> bool:
    """Whether an address is on the internet: not private, loopback, link-local, multicast, or reserved.

    An IPv6 address that leads to an IPv4 one (mapped, NAT64, 6to4) is what the other is.
    """
    if isinstance(address, ipaddress.IPv6Address):
        last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        inner = address.ipv4_mapped or address.sixtofour or (last if address in _NAT64 else None)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def fetch(url: str, limits: FetchLimits | None = None, allowed: Callable[[Address], bool] = is_public) -> bytes:
    """The bytes behind an http or https address.

    Args:
        url: the address; credentials in it are refused.
        limits: time, size and redirects.
        allowed: which network addresses may be connected to.

    Raises:
        BadRowError: unreachable, not 200, an address that is not allowed, any limit passed.
    """
    limits = limits or FetchLimits()
    deadline = time.monotonic() + limits.time_s
    for _ in range(limits.redirects + 1):
        try:
            data, location = _get(url, limits.size_bytes, deadline, allowed)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, BadRowError):
                raise
            raise BadRowError(f"image {url!r} cannot be fetched: {error or type(error).__name__}") from error
        if location is None:
            return data
        url = urljoin(url, location)
    raise BadRowError(f"image {url!r}: more than {limits.redirects} redirects")


def _get(url: str, max_bytes: int, deadline: float, allowed: Callable[[Address], bool]) -> tuple[bytes, str | None]:
    """(body, None), or (b"", where to look instead)."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
        raise BadRowError(f"image {url!r}: only http and https addresses without credentials are fetched")
    with _connected(parts, deadline, allowed) as connection:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "megatron_mmrl"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            return b"", location
        if response.status != http.client.OK:
            raise OSError(f"the server answered {response.status} {response.reason}")
        return _body(response, max_bytes, deadline), None


@contextmanager
def _connected(
    parts: SplitResult, deadline: float, allowed: Callable[[Address], bool]
) -> Iterator[http.client.HTTPConnection]:
    """A connection to the address that was checked, cut when time is up: timeouts of a socket start anew per byte."""
    host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if refused := [text for text in addresses if not allowed(ipaddress.ip_address(text))]:
        raise BadRowError(f"image {parts.geturl()!r}: {host} is {', '.join(refused)}, not a public address")
    with ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection((addresses[0], port), timeout=_left(deadline)))
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = stack.enter_context(context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False))
        watch = threading.Timer(_left(deadline), _cut, (sock,))
        watch.daemon = True
        watch.start()
        stack.callback(watch.cancel)
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        yield connection


def _cut(sock: socket.socket) -> None:
    with suppress(OSError):  # closed a moment ago
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the connection below TLS: no farewell is waited for


def _body(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    for piece in iter(partial(response.read1, _READ_BYTES), b""):
        data += piece
        if len(data) > max_bytes:
            raise OSError(f"more than {max_bytes} bytes")
    _left(deadline)
    if response.length:
        raise OSError(f"the connection ended {response.length} bytes too early")
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time limit has passed")
    return left
