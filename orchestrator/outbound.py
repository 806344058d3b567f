"""One POST to an address that was checked: no redirects, no proxies, bounded in time and bytes.

The name is resolved once, every address it has is checked, and the connection is made to one of
those very addresses: a name that answers otherwise a moment later changes nothing. Knows nothing
of jobs, nor of what is sent.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from orchestrator.errors import SpecError

WHOLE_SECONDS = 15.0
_CONNECT_SECONDS = 5.0
_READ_BYTES = 4096
_LONGEST_URL = 2000

# Public by the registries, and yet the clouds' own: metadata at Oracle and Azure.
_CLOUDS = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))
_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Unsent(Exception):
    """The other side did not take it; the text says why, without the URL or what was answered."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL in its parts, and the addresses of its host, all of which may be spoken to."""

    secure: bool
    host: str
    port: int
    netloc: str
    path: str
    addresses: tuple[str, ...]


def target(url: str, *, private: bool) -> Target:
    """Where the URL leads now. Resolves its host: may take as long as the system's resolver.

    `private`: loopback, private and link-local addresses may be spoken to as well. Raises
    SpecError for anything but http and https, for credentials, and for a host that has an
    address which may not be spoken to, or none; the URL, which may hold a secret, is not repeated.
    """
    parts = _parts(url)
    try:
        found = socket.getaddrinfo(parts.host, parts.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _refused("a host that can be resolved", parts.host) from None
    addresses = tuple(dict.fromkeys(str(place[0]) for *_, place in found))
    for address in addresses:
        if not may_reach(address, private=private):
            raise _refused("a host with public addresses only", f"{parts.host} ({address})")
    return Target(parts.secure, parts.host, parts.port, parts.netloc, parts.path, addresses)


def may_reach(address: str, *, private: bool) -> bool:
    """Whether the address may be spoken to. IPv6 that wraps around IPv4 may not, but for NAT64."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if private:
        return not (found.is_multicast or found.is_unspecified)
    if found in _NAT64:
        found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    if isinstance(found, ipaddress.IPv4Address):
        own = any(found in network for network in _CLOUDS)
        return found.is_global and not found.is_multicast and not own
    wraps = found.sixtofour is not None or found.teredo is not None
    return found in _UNICAST and found.is_global and not wraps


def post(to: Target, body: bytes, headers: Mapping[str, str]) -> int:
    """Send it to the first address that can be connected to; the status of the answer.

    Takes `WHOLE_SECONDS` at most beside connecting. Raises Unsent when there was no answer.
    """
    # A socket's own limit is for one read: whoever sends a byte now and then would hold us. The
    # one that is watched is a second handle, since TLS takes the first one over.
    with _connected(to) as raw, raw.dup() as watched:
        cut = threading.Event()
        watch = threading.Timer(WHOLE_SECONDS, _shut, [watched, cut])
        watch.daemon = True
        watch.start()
        try:
            status = _exchange(to, raw, body, headers)
            if cut.is_set():  # half a head reads like a whole one
                raise TimeoutError
            return status
        except TimeoutError:
            raise Unsent("it took too long to answer") from None
        except ssl.SSLError as error:
            raise Unsent(f"TLS: {error.reason or 'failed'}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unsent(f"the connection broke ({type(error).__name__})") from None
        finally:
            watch.cancel()


def _exchange(to: Target, raw: socket.socket, body: bytes, headers: Mapping[str, str]) -> int:
    raw.settimeout(WHOLE_SECONDS)
    connection = http.client.HTTPConnection(to.host, to.port)
    if to.secure:
        raw = ssl.create_default_context().wrap_socket(raw, server_hostname=to.host)
    connection.sock = raw
    try:
        connection.request("POST", to.path, body, {"Host": to.netloc, **headers})
        answer = connection.getresponse()
        answer.read(_READ_BYTES)  # so that the other side is not cut off while it answers
        return answer.status
    finally:
        connection.close()


def _connected(to: Target) -> socket.socket:
    why = "no address"
    for address in to.addresses:
        try:
            return socket.create_connection((address, to.port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            why = "it took too long" if isinstance(error, TimeoutError) else error.strerror or why
    raise Unsent(f"no connection: {why}")


def _shut(raw: socket.socket, cut: threading.Event) -> None:
    cut.set()
    try:
        raw.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        return


@dataclass(frozen=True, slots=True)
class _Parts:
    secure: bool
    host: str
    port: int
    netloc: str
    path: str


def _parts(url: str) -> _Parts:
    if len(url) > _LONGEST_URL:
        raise _refused(f"at most {_LONGEST_URL} characters", f"{len(url)}")
    # Whatever a parser might drop or read differently from the one that connects.
    if not all("!" <= letter <= "~" and letter not in '\\"<>^`{|}' for letter in url):
        raise _refused("an ASCII URL, percent-encoded", "other characters")
    try:
        split = urlsplit(url)
        port, host = split.port, split.hostname
    except ValueError:
        raise _refused("a URL", "something else") from None
    if split.scheme not in ("http", "https"):
        raise _refused("http:// or https://", f"{split.scheme[:20]!r}")
    if not host or port == 0:
        raise _refused("a host", "none")
    if "@" in split.netloc:
        raise _refused("a URL without credentials", "a user or password in it")
    secure = split.scheme == "https"
    path = (split.path or "/") + (f"?{split.query}" if split.query else "")
    return _Parts(secure, host, port or (443 if secure else 80), split.netloc, path)


def _refused(expected: str, got: str) -> SpecError:
    return SpecError("webhook", expected, got)
