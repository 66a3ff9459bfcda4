"""Where KV is served: `unix:///path` and `tcp://host:port`. The only file that knows address families.

A further back end is a further scheme here (docs/decisions/0004-kv-transport.md).
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from shared.errors import AmpdError, ErrorCode
from shared.transport.channel import Interrupt, set_kernel_timeout


class Endpoint(NamedTuple):
    """A Unix socket's path, or a host and port (path is empty)."""

    path: str
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix://{self.path}" if self.path else f"tcp://{host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Raises AmpdError INVALID_REQUEST."""
    try:
        parts = urlsplit(text)
        if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
            return Endpoint(parts.path)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path:
            return Endpoint("", parts.hostname, parts.port)
    except ValueError:  # a port that is no number
        pass
    raise AmpdError(ErrorCode.INVALID_REQUEST, f"KV endpoint {text!r}: write tcp://host:port or unix:///path")


def listen(text: str, backlog: int) -> tuple[socket.socket, str]:
    """Open a listening socket; returns it with the endpoint to advertise (the port that was given for port 0).

    Raises AmpdError INVALID_REQUEST that says what to change.
    """
    endpoint = parse_endpoint(text)
    if not endpoint.path and _is_wildcard(endpoint.host):
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"KV endpoint {text}: name the interface or host that peers reach, not a wildcard",
        )
    try:
        if endpoint.path:
            return _listen_unix(endpoint.path, backlog), str(endpoint)
        family, kind, _, _, address = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(backlog)
        except OSError:
            sock.close()
            raise
        return sock, str(endpoint._replace(port=sock.getsockname()[1]))
    except OSError as error:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"cannot listen for KV on {text}: {error}") from error


def _listen_unix(path: str, backlog: int) -> socket.socket:
    _remove_dead_socket(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        Path(path).chmod(0o600)  # before listen(): nobody connects while it is wider
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def _remove_dead_socket(path: str) -> None:
    """A killed process leaves its socket's file behind; a living one's is not touched, and bind() then refuses."""
    if not _is_socket(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False


def _is_wildcard(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def preferred_endpoints(endpoints: Sequence[str]) -> list[Endpoint]:
    """Unix sockets that exist on this host first, then TCP; the others cannot be reached from here."""
    parsed = [parse_endpoint(text) for text in endpoints]
    return [e for e in parsed if e.path and _is_socket(e.path)] + [e for e in parsed if not e.path]


def connect(endpoint: Endpoint, timeout_s: float, interrupt: Interrupt) -> socket.socket:
    """Connect, blocking at most timeout_s per address; `interrupt` watches the socket from before it connects.

    Raises OSError.
    """
    addresses: list[tuple[int, Any]]  # Any: the address's type depends on the family
    if endpoint.path:
        addresses = [(socket.AF_UNIX, endpoint.path)]
    else:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        addresses = [(family, address) for family, _, _, _, address in found]
    failure = OSError(f"{endpoint} has no address")
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        interrupt.watch(sock)
        try:
            set_kernel_timeout(sock, socket.SO_SNDTIMEO, timeout_s)  # bounds connect() too
            sock.connect(address)
            return sock
        except OSError as error:
            failure = error
            interrupt.forget()
            sock.close()
    raise failure
