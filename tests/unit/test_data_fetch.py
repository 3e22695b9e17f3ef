"""Images from the web: fetched within limits, never from an address that is not public."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import pytest

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.fetch import Address, FetchLimits, fetch, is_public
from megatron_mmrl.data.images import read_image

BODY = b"\x89PNG" + bytes(5000)


class Handler(BaseHTTPRequestHandler):
    """``/to/<url>`` redirects there, ``/loop`` to itself, ``/slow`` sends a byte now and then, ``/cut`` half of it."""

    drops = 0

    def do_GET(self) -> None:
        if self.path.startswith(("/to/", "/loop")):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/") if self.path != "/loop" else "/loop")
            self.end_headers()
        elif self.path == "/slow":
            self.drip()
        else:
            self.send_response(404 if self.path == "/none" else 200)
            if self.path != "/endless":
                self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:100] if self.path == "/cut" else BODY)

    def drip(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for Handler.drops in range(100):
            try:
                self.wfile.write(b"X-Slow: 1\r\n")
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def only_here(address: Address) -> bool:
    return address == ip_address("127.0.0.1")


def test_a_picture_is_fetched_also_behind_a_redirect(server: str) -> None:
    assert fetch(f"{server}/a.png?size=2", allowed=only_here) == BODY
    assert fetch(f"{server}/endless", allowed=only_here) == BODY
    assert fetch(f"{server}/to/{server}/to//a.png", allowed=only_here) == BODY
    assert read_image({"path": f"{server}/a.png"}, None, lambda url: fetch(url, allowed=only_here)) == BODY


@pytest.mark.parametrize(
    ("path", "limits", "reason"),
    [
        ("/a.png", FetchLimits(size_bytes=4999), "more than 4999 bytes"),
        ("/endless", FetchLimits(size_bytes=4999), "more than 4999 bytes"),
        ("/none", FetchLimits(), "404"),
        ("/loop", FetchLimits(redirects=2), "more than 2 redirects"),
        ("/cut", FetchLimits(), "4904 bytes too early"),
        ("/to/file:///etc/passwd", FetchLimits(), "only http and https"),
        ("/to/http://user:word@127.0.0.1/", FetchLimits(), "without credentials"),
        ("/to/http://127.0.0.2/a.png", FetchLimits(), "127.0.0.2, not a public address"),
        ("/to/http://[::1]/a.png", FetchLimits(), "::1, not a public address"),
    ],
)
def test_what_passes_a_limit_is_refused(server: str, path: str, limits: FetchLimits, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        fetch(server + path, limits, only_here)


def test_a_server_that_drips_is_cut_off(server: str) -> None:
    """Its headers would take five seconds; every byte of them comes within a socket's timeout."""
    with pytest.raises(BadRowError, match="cannot be fetched"):
        fetch(f"{server}/slow", FetchLimits(time_s=0.3), only_here)
    assert Handler.drops < 99


def test_private_addresses_are_refused_by_whatever_name(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRowError, match=r"127\.0\.0\.1, not a public address"):
        fetch(f"{server}/a.png")
    with pytest.raises(BadRowError, match="not a public address"):
        fetch(server.replace("127.0.0.1", "localhost"))
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))
    inside = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [public, inside])
    with pytest.raises(BadRowError, match=r"10\.0\.0\.7, not a public address"):  # one of several is enough
        fetch("http://pictures.example/a.png")


def test_the_name_is_resolved_once(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers with another address the second time is not asked a second time."""
    port = int(server.rpartition(":")[2])
    answers = iter(["127.0.0.1", "127.0.0.2"])
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> object:
        return real(next(answers) if host == "rebind.example" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert fetch(f"http://rebind.example:{port}/a.png", allowed=only_here) == BODY
    assert next(answers) == "127.0.0.2"


def test_addresses_that_are_not_public() -> None:
    inside = "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255"
    inside += " ::1 :: fe80::1 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::7f00:1"
    inside += " 64:ff9b::7f00:1 64:ff9b:1::a00:1 2002:a00:1::"  # 127.0.0.1 and 10.0.0.1 by NAT64 and 6to4
    for text in inside.split():
        assert not is_public(ip_address(text)), text
    for text in ("93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ip_address(text)), text


def test_a_run_fetches_nothing(server: str) -> None:
    with pytest.raises(BadRowError, match="no image is fetched in a run"):
        read_image({"path": f"{server}/a.png"}, "/")
