"""Fetch a picture's bytes from a web address, under limits of size and time, and never from a private address.

Every hop's host is looked up once, checked, and connected to by that very address, so a name cannot point
elsewhere between check and use. Proxy settings from the environment are left out for the same reason.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from concurrent import futures
from typing import Any, cast
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from detgpt.errors import ImageError

MAX_SECONDS = 20.0  # of a whole download: name look-up, every redirect, headers and body
MAX_REDIRECTS = 5


def download(url: str, max_bytes: int, max_seconds: float, allow_private: bool) -> bytes:
    """Fetch a URL; each hop's host is looked up once, checked, and connected to by that very address."""
    deadline = time.monotonic() + max_seconds
    name, parts = shown_url(url), _split(url)
    headers = {"Accept": "image/*", "User-Agent": "detgpt", "Connection": "close"}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    for _ in range(MAX_REDIRECTS + 1):
        try:
            body, redirect = _get(parts, headers, max_bytes, deadline, allow_private)
        except ImageError:
            raise
        except TimeoutError:
            raise ImageError(f"{name} took over {max_seconds:g} s. Retry, or raise max_seconds.") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError(f"{name} cannot be fetched: {error}. Check address and network.") from error
        if redirect is None:
            return body
        parts = _split(redirect)
        headers.pop("Authorization", None)  # it was meant for the first address alone
    raise ImageError(f"{name} redirects more than {MAX_REDIRECTS} times. Pass the final address.")


def _get(
    parts: SplitResult, headers: dict[str, str], max_bytes: int, deadline: float, allow_private: bool
) -> tuple[bytes, str | None]:
    """One request: the body, or the address that a redirect names."""
    name, host, tls = shown_url(parts.geturl()), parts.hostname or "", parts.scheme == "https"
    default_port = 443 if tls else 80
    request = http.client.HTTPConnection(host, parts.port or default_port)
    request.default_port = default_port  # which the Host header leaves out
    target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    with _connect(host, request.port, tls, deadline, allow_private) as request.sock:
        request.request("GET", quote(target, safe="/?%:@!$&'()*+,;=~"), headers=headers)
        reader = cast(socket.socket, _DeadlineReader(request.sock, deadline))
        with http.client.HTTPResponse(reader, method="GET") as response:
            response.begin()
            if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
                return b"", urljoin(parts.geturl(), location)
            if response.status != 200:
                raise ImageError(f"{name} answers with HTTP status {response.status}. Check the address.")
            announced = response.length or 0
            body = response.read(max_bytes + 1) if announced <= max_bytes else b""
    if max(announced, len(body)) > max_bytes:
        raise over_limit(name, max_bytes)
    if len(body) < announced:
        raise http.client.IncompleteRead(body, announced - len(body))
    return body, None


class _DeadlineReader(io.RawIOBase):
    """Reads a socket up to a deadline; the socket's own timeout would start anew with every byte."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:  # what HTTPResponse asks of a socket
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_seconds_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect(host: str, port: int, tls: bool, deadline: float, allow_private: bool) -> socket.socket:
    addresses = _look_up(host, port, deadline)
    private = [address for address in addresses if not _is_public(address)]
    if private and not allow_private:
        raise ImageError(
            f"the host {host!r} has the non-public address {private[0]}. "
            "Pass a public URL, or allow_private_urls=True if you trust whoever chose this one."
        )
    for tried, address in enumerate(addresses, start=1):
        # A dead address leaves time for the next.
        patience = _seconds_left(deadline) / (len(addresses) - tried + 1)
        try:
            sock = socket.create_connection((address, port), timeout=patience)
            break
        except OSError:
            if tried == len(addresses):
                raise
    if not tls:
        return sock
    sock.settimeout(_seconds_left(deadline))
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(sock.close)
        wrapped = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        on_failure.pop_all()
    return wrapped


def _look_up(host: str, port: int, deadline: float) -> list[str]:
    """All addresses of a host. The system's look-up knows no timeout, so a thread waits for it."""
    answer: futures.Future[list[str]] = futures.Future()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.set_result(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, ValueError) as error:
            answer.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        return answer.result(timeout=_seconds_left(deadline))
    except futures.TimeoutError:  # a type of its own until Python 3.11
        raise TimeoutError from None


# Not the open internet, though `ipaddress` calls some of them global, depending on Python's version.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's metadata
        "192.0.0.0/24",  # protocol assignments, among them Oracle's metadata
        "192.88.99.0/24", "2001::/32", "2002::/16",  # 6to4 and Teredo carry an IPv4 address inside
        "64:ff9b:1::/48",  # local NAT64
        "fec0::/10",  # site-local
    )
)  # fmt: skip
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        if inner is not None:
            return _is_public(str(inner))
    if ip.is_multicast or ip.is_reserved or ip.is_link_local or any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        complete = bool(parts.hostname) and parts.port != 0  # .port raises when it is no number
    except ValueError:
        raise ImageError(f"{shown_url(url)} is not a valid URL. Write it as https://host/picture.jpg.") from None
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"{shown_url(url)} is not an http: or https: URL. Download it and pass its path.")
    if not complete:
        raise ImageError(f"{shown_url(url)} names no host and port. Write it as https://host/picture.jpg.")
    return parts


def shown_url(url: str) -> str:
    """The URL as messages show it: without login, query (it may hold a signature) and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the URL"
    host = parts.netloc.rpartition("@")[2]
    return quoted(f"{parts.scheme}://{host}{parts.path}" + ("?..." if parts.query else ""))


def quoted(text: object) -> str:
    shown = str(text)
    return repr(shown if len(shown) <= 200 else shown[:197] + "...")


def over_limit(name: str, max_bytes: int) -> ImageError:
    return ImageError(f"{name} is over {max_bytes} bytes. Pass a smaller image, or raise max_bytes.")
